"""`llmc oci`: artifacts in OCI image layouts, to travel through a container registry."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

_FOLDER = click.Path(path_type=Path)
_TAG = click.option("--tag", default="latest", show_default=True, help="Name of the artifact in the layout.")


@click.group()
def oci_group() -> None:
    """Put artifacts into an OCI image layout (a folder), and take them out; oras, skopeo or crane copy layouts to and from registries."""


@oci_group.command("push")
@click.argument("artifact", type=_FOLDER)
@click.argument("layout", type=_FOLDER)
@_TAG
def push_command(artifact: Path, layout: Path, tag: str) -> None:
    """Put ARTIFACT into the folder LAYOUT, which is made if it is not there."""
    from llmc.artifacts.oci import push

    print(f"{push(artifact, layout, tag)}: {artifact} as {tag} in {layout}")


@oci_group.command("pull")
@click.argument("layout", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@_TAG
@click.option("--force", is_flag=True, help="Replace an artifact that is at OUT.")
def pull_command(layout: Path, out: Path, tag: str, force: bool) -> None:
    """Publish the artifact in the folder LAYOUT as OUT, every byte verified."""
    from llmc.artifacts.oci import pull

    print(f"{out}: {pull(layout, tag, out, force=force)}")
