"""`--backend tvm`: the captured graph compiled for a CPU by Apache TVM in Inductor's place."""
