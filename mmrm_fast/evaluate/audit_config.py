"""What `mmrm-fast audit` takes."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mmrm_fast.config import ReadConfig


@dataclass(frozen=True)
class AuditConfig(ReadConfig):
    """Say what text alone can tell of preference files, before a GPU is booked: shortcuts, wrong labels, duplicates."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Preference files of any layout that training reads."""
    model: Path | None = None
    """Folder of an InternVL checkpoint, whose states over text alone are a further proxy."""
    eval: tuple[str, ...] = ()
    """Test sets, NAME=FILE, that are tested on and looked for in the files."""
    output_dir: Path = Path("runs/audit")
    """Folder of audit.json and audit.html."""
