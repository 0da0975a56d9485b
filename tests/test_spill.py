"""Ray's spill folder on a full disk: labelling puts nothing there, whatever it reads."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from untrained_teacher import save_teacher

sys.path.insert(0, str(Path(__file__).parent))
from in_process import without_ray  # noqa: E402

from glipv2.jobs.cli import main  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STORE = 75 << 20
"""Bytes of the object store, the least that Ray takes."""
SHARDS, PAIRS, SIDE = 4, 9, 1200


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        (disk / "spills").mkdir()
        with pytest.raises(OSError, match="No space left"):
            (disk / "others").write_bytes(bytes(2 << 20))
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def write_pairs(folder: Path) -> int:
    """Pictures of noise, which don't compress; the bytes of them all."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    total = 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for pair in range(PAIRS):
                noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator)
                picture = io.BytesIO()
                Image.fromarray(noise.to(torch.uint8).numpy()).save(picture, "png")
                members = {"png": picture.getvalue(), "txt": b"a red circle above a blue square"}
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{shard}-{pair}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    total += len(data)
    return total


def test_a_full_disk_under_rays_spills_stops_no_labelling(
    full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    assert write_pairs(tmp_path / "pairs") > 1.5 * STORE
    assert main(["prepare", "webdataset", "--root", str(tmp_path / "pairs"), "--index-only"]) == 0
    save_teacher(tmp_path / "teacher")
    settings = {"teacher": str(tmp_path / "teacher"), "score_threshold": 0.3, "keep_empty": True}

    def command(out: str) -> list[str]:
        inputs = {str(tmp_path / "pairs"): str(tmp_path / out)}
        tree = {"run_dir": str(tmp_path / "run"), "label": {**settings, "inputs": inputs}}
        (tmp_path / f"{out}.yaml").write_text(yaml.safe_dump(tree))
        return ["label", str(tmp_path / f"{out}.yaml")]

    with without_ray():
        assert main(command("expected")) == 0
    ray.shutdown()
    spills = full_disk / "spills"
    store = {"object_store_memory": STORE, "object_spilling_directory": str(spills)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **store})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert main(command("out")) == 0
        for shard in range(SHARDS):
            name = f"{shard:06d}.tar"
            expected = (tmp_path / "expected" / name).read_bytes()
            assert (tmp_path / "out" / name).read_bytes() == expected
        assert not list(spills.rglob("*"))
        # what would have come of pictures in the object store
        with pytest.raises((ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)):
            _ = [ray.put(bytes(STORE // 4)) for _ in range(8)]
    finally:
        ray.shutdown()
        cluster.shutdown()
