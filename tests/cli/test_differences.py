"""What a person reads when the cache misses."""

from __future__ import annotations

from llmc.artifacts.keys import PartDifference
from llmc.cli.differences import difference_lines


def test_of_settings_only_what_differs_is_shown() -> None:
    differences = [
        PartDifference(part="model/config.json", a="12ab", b=None),
        PartDifference(part="settings", a='{"level": 2, "seed": 0}', b='{"block_size": 16, "level": 1, "seed": 0}'),
        PartDifference(part="version/c++", a="{odd", b="{}"),
    ]
    assert list(difference_lines(differences)) == [
        "model/config.json: 12ab there, None here",
        "settings.block_size: nothing there, 16 here",
        "settings.level: 2 there, 1 here",
        "version/c++: {odd there, {} here",
    ]
