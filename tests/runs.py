"""Records to train on, what a run folder says, and the processes of a run."""

import json
import subprocess
import time

import psutil


def mixed_records(pictures):
    """Pairwise and K-wise, with one image, two and none; 11 records, so that some step is uneven."""
    photo, wide = pictures["photo"], pictures["wide"]
    pairs = [
        {"prompt": f"What is in picture {i}?", "img_path": image, "chosen": f"two red circles {i}", "rejected": "a cat"}
        for i, image in enumerate([photo, None, wide, None, None, [photo, wide], wide, pictures["tall"]])
    ]
    kwise = [
        {
            "prompt": "Rate them.",
            "img_path": photo,
            "completions": {
                "annotations": [{"Helpfulness": {"Rating": rating}} for rating in ("5", "3", "N/A", "1")],
                "response": [f"answer {i} of {j}" for j in range(4)],
            },
        }
        for i in range(3)
    ]
    return pairs + kwise


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in read(folder / "metrics.jsonl")]


def margins(folder, name="small"):
    return [row["margin"] for row in read(folder / f"eval-{name}.jsonl")]


def descendants(root, name):
    """Processes below `root` whose command line holds `name`."""
    listing = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    children, commands = {}, {}
    for line in listing.splitlines():
        pid, parent, command = line.split(None, 2)
        children.setdefault(int(parent), []).append(int(pid))
        commands[int(pid)] = command
    below, found = children.get(root, []), []
    while below:
        pid = below.pop()
        below += children.get(pid, [])
        found += [pid] * (name in commands[pid])
    return found


def listening(root):
    """(process, address, port) of every socket on which `root` and all below it listen, as procfs has them."""
    found = set()
    for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
        try:
            sockets = process.net_connections(kind="inet")
        except psutil.Error:  # it ended
            continue
        open_here = [own.laddr for own in sockets if own.status == psutil.CONN_LISTEN]
        found |= {(process.pid, address.ip.removeprefix("::ffff:"), address.port) for address in open_here}
    return found


def wait_until(condition, what, *, seconds=300, every=0.05):
    """What `condition` gives as soon as it is true; AssertionError with `what` (called, where it can be) by then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} seconds: {what() if callable(what) else what}"
        time.sleep(every)
    return found
