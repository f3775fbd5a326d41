"""LLMC_* variables that nothing reads: a mistyped one should not go unnoticed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from llmc.config.settings import SETTINGS

# Read elsewhere than in the settings table.
_OTHERS = {"LLMC_CACHE_DIR", "LLMC_BENCH_DIR", "LLMC_SOAK_S", "LLMC_TENSORS"}
_TESTS = "LLMC_TEST_"
# What Kubernetes puts into every pod beside a service named llmc.
_SERVICE_LINK = re.compile(r"LLMC_(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each LLMC_* variable that is no setting."""
    known = {setting.env for setting in SETTINGS} | _OTHERS
    sentences = []
    for name in sorted(environ):
        if not name.startswith("LLMC_") or name in known or name.startswith(_TESTS) or _SERVICE_LINK.fullmatch(name):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; docs/flags.md lists the settings"
        sentences.append(f"the environment variable {name} is no setting of llmc and is not used{hint}")
    return sentences
