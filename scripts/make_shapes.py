"""Writes the synthetic preference environments of `mmrm_fast.data.shapes`."""

from pathlib import Path

import tyro

from mmrm_fast.data.shapes import ENVIRONMENTS, ShapesConfig, make_environments

DEFAULTS = ShapesConfig()


def main(
    folder: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[ShapesConfig] = DEFAULTS,
    environments: tuple[str, ...] = ENVIRONMENTS,
    progress: bool = True,
):
    """Writes one sub-folder per environment.

    Args:
        folder: where to write; must not exist or be empty.
        config: what to generate.
        environments: names of the environments to write, also prompt, order, xor and mixture.
        progress: show a progress bar.
    """
    for name, path in make_environments(folder, config, environments, progress).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    tyro.cli(main)
