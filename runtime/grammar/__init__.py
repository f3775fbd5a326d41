"""Structured output: grammars compiled in processes that can be killed, and the masks they give each step."""
