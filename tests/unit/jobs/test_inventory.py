"""`cloudtrain vm list`: the real output of each source, and what is reported where a source fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.jobs import inventory
from hf_cloudtrain.jobs.spec.values import Machine


class Machines:
    """A machine with the programs and files that a test gives it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.store = folder / "store"
        self.store.mkdir()
        self.catalogs = folder / "sky" / ".sky" / "catalogs"

    def program(self, name: str, says: str, code: int = 0) -> None:
        path = self.bin / name
        (self.bin / f"{name}.says").write_text(says)
        path.write_text(f'#!/bin/sh\ncat "$0.says"{" >&2" if code else ""}\nexit {code}\n')
        path.chmod(0o755)

    def catalog(self, cloud: str, text: str, version: str = "v10") -> None:
        path = self.catalogs / version / cloud / "vms.csv"
        path.parent.mkdir(parents=True)
        path.write_text(text)

    def own(self, text: str) -> None:
        (self.store / "vms.yml").write_text(text)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("PATH", f"{found.bin}:/bin")
    monkeypatch.setattr(
        inventory.shutil, "which", lambda name: path if (path := found.bin / name).exists() else None
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(found.store))
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path / "sky"))
    monkeypatch.setattr(inventory.platform, "node", lambda: "box")
    monkeypatch.setattr(inventory, "_cores", lambda: 16)
    return found


def shown(*words: str) -> list[str]:
    """The lines of the table, without its header."""
    result = CliRunner().invoke(app, ["vm", "list", *words])
    assert result.exit_code == 0, result.output
    lines = [" ".join(re.sub("[┃│]", " ", line).split()) for line in result.stdout.splitlines()]
    if not lines:
        return []
    assert all(cell_len(line) <= 80 for line in result.stdout.splitlines())
    header = next(index for index, line in enumerate(lines) if line.startswith("VM "))
    return [line for line in lines[header + 1 :] if re.match(r"\w", line)]


def listed(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["vm", "list", "--json", *words])
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class TestThisMachine:
    """`nvidia-smi`, or else the cores."""

    def test_without_a_gpu_the_cores_are_listed(self, machines: Machines) -> None:
        assert shown() == ["local box 16 CPU cores"]

    @pytest.mark.parametrize(
        ("names", "lines"),
        [
            (["NVIDIA H200, 143771"], ["local-141gb-h200-1g-box local box H200"]),
            (["Tesla V100-SXM2-16GB, 16160"] * 4, ["local-16gb-v100-4g-box local box V100"]),
            (["NVIDIA A100-SXM4-80GB, 81920"] * 8, ["local-80gb-a100-8g-box local box A100"]),
            (["NVIDIA H100 80GB HBM3, 81559"], ["local-80gb-h100-1g-box local box H100"]),
            (["NVIDIA RTX A6000, 49140"], ["local-48gb-rtx-a6000-1g-box local box RTX-A6000"]),
            (
                ["NVIDIA L4, 23034", "Tesla T4, 15360"],
                [
                    "local-24gb-l4-1g-box local box L4",
                    "local-16gb-t4-1g-box local box T4",
                ],
            ),
            (["NVIDIA GB10, [N/A]"], ["local box 1 x GB10"]),
        ],
    )
    def test_gpus_are_counted_by_type(self, machines: Machines, names: list[str], lines: list[str]) -> None:
        machines.program("nvidia-smi", "\n".join(names) + "\n")
        assert shown() == lines

    def test_a_driver_without_a_gpu_counts_as_a_machine_without_one(self, machines: Machines) -> None:
        machines.program("nvidia-smi", "No devices were found\n", code=6)
        assert shown() == ["local box 16 CPU cores"]
        assert listed()["problems"] == []

    def test_a_driver_that_fails_is_reported(self, machines: Machines) -> None:
        machines.program("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate\n", code=9)
        assert listed()["vms"] == []
        assert "couldn't communicate" in listed()["problems"][0]


class TestSlurm:
    """The output of `sinfo` of Slurm 22.05, printed by a script of ours."""

    SAYS = (
        "spot|gpu:v100:4|0/2/0/2|REQUEUE|up|16\n"
        "prod|gpu:v100:4|1/1/0/2|OFF|up|16\n"
        "cpu|(null)|0/3/1/4|SUSPEND,GANG|up|64+\n"
        "old|gpu:k80:2(S:0-1),gpu:2,shard:8|0/0/1/1|CANCEL|down|8\n"
    )

    def test_partitions_are_regions(self, machines: Machines) -> None:
        machines.program("sinfo", self.SAYS)
        assert shown("--cloud", "slurm") == [
            "slurm-16gb-v100-4g-spot-spot slurm spot V100 2 of 2 idle",
            "slurm-16gb-v100-4g-prod slurm prod V100 1 of 2 idle",
            "slurm cpu 64 CPU cores 3 of 4 idle",
            "slurm-12gb-k80-2g-old-spot slurm old K80 partition down",
            "slurm old 2 x GPU, spot partition down",
        ]

    @pytest.mark.parametrize(
        ("gres", "gpus"),
        [
            ("(null)", []),
            ("gpu:4", [("", 4)]),
            ("gpu", [("", 1)]),
            ("gpu:a100", [("a100", 1)]),
            ("gpu:a100_80gb:2(S:0,1),nic:1", [("a100_80gb", 2)]),
        ],
    )
    def test_every_form_of_gres_is_read(self, gres: str, gpus: list[tuple[str, int]]) -> None:
        assert list(inventory._gres(gres)) == gpus

    def test_the_memory_in_the_name_of_a_gpu_type_is_used(self, machines: Machines) -> None:
        machines.program("sinfo", "big|gpu:a100_80gb:8|0/1/0/1|OFF|up|16\n")
        assert shown("--gpu", "A100") == ["slurm-80gb-a100-8g-big slurm big A100 1 of 1 idle"]

    @pytest.mark.parametrize(
        ("says", "code", "reported"),
        [
            (
                "sinfo: error: one\nsinfo: fatal: Could not establish a configuration source\n",
                1,
                "fatal: Could not",
            ),
            ("PARTITION AVAIL\n", 0, "not a list of partitions"),
        ],
    )
    def test_a_slurm_that_fails_is_reported_and_the_other_sources_are_shown(
        self, machines: Machines, says: str, code: int, reported: str
    ) -> None:
        machines.program("sinfo", says, code)
        result = CliRunner().invoke(app, ["vm", "list"])
        assert result.exit_code == 0
        assert "16 CPU cores" in result.stdout
        assert result.stderr.startswith("Warning: `sinfo`")
        assert reported in result.stderr

    def test_a_program_that_hangs_times_out(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inventory, "TIMEOUT", 0.2)
        (machines.bin / "sinfo").write_text("#!/bin/sh\nexec sleep 60\n")
        (machines.bin / "sinfo").chmod(0o755)
        assert listed()["problems"] == ["`sinfo` timed out after 0.2 s."]


class TestUserList:
    """`vms.yml`."""

    def test_listed_machines_are_shown(self, machines: Machines) -> None:
        machines.own(
            "vms:\n- vm: rack-80gb-h100-8g-berlin\n  quota: 4\n- vm: lab-24gb-rtx-4090-2g-attic-spot\n"
        )
        assert shown()[1:] == [
            "rack-80gb-h100-8g-berlin rack berlin H100 4",
            "lab-24gb-rtx-4090-2g-attic-spot lab attic RTX-4090",
        ]

    def test_the_file_in_the_home_folder_counts_where_the_store_has_none(self, machines: Machines) -> None:
        home = Path.home() / ".hf_cloudtrain"
        home.mkdir()
        (home / "vms.yml").write_text("vms:\n- vm: rack-80gb-h100-8g-berlin\n")
        assert [vm["source"] for vm in listed()["vms"]] == ["local", "vms.yml"]
        machines.own("vms: []\n")
        assert [vm["source"] for vm in listed()["vms"]] == ["local"]

    def test_every_mistake_is_reported_by_line_and_the_other_sources_are_shown(
        self, machines: Machines
    ) -> None:
        machines.own(
            "vms:\n- vm: rack-80gb-h100-8g-berlin\n- vm: 4 big ones\n- vm: rack-80gb-h100-8g-berlin\n  qouta: 3\n"
            "- quota: -1\n"
        )
        result = CliRunner().invoke(app, ["vm", "list"])
        assert result.exit_code == 1
        assert "16 CPU cores" in result.stdout
        lines = [line.removeprefix(f"{machines.store}/") for line in result.stderr.splitlines()]
        assert [line.split(": ")[0] for line in lines] == [
            "vms.yml:3",
            "vms.yml:4",
            "vms.yml:5",
            "vms.yml:6",
            "vms.yml:6",
        ]
        assert "'4 big ones' is not a machine type" in lines[0]
        assert "is a duplicate" in lines[1]
        assert "unknown key 'vms.2.qouta'. The nearest known key is 'quota'" in lines[2]
        assert listed()["problems"][0].endswith(lines[0].removeprefix("vms.yml:3: "))

    def test_a_store_that_fails_is_reported(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", "nosuch://bucket")
        found = listed()
        assert len(found["problems"]) == 1
        assert "nosuch" in found["problems"][0]
        assert len(found["vms"]) == 1


AWS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
a1.large,,,2.0,4.0,,0.0642,0.064200,us-east-1,use1-az2,arm64
p3.8xlarge,V100,4.0,32.0,244.0,"{'Gpus': [{'Name': 'V100', 'MemoryInfo': {'SizeInMiB': 16384}}]}",12.24,3.7,us-east-1,a,x86_64
p3.8xlarge,V100,4.0,32.0,244.0,"{'Gpus': [{'Name': 'V100', 'MemoryInfo': {'SizeInMiB': 16384}}]}",12.24,3.9,us-east-1,b,x86_64
p3dn.24xlarge,V100-32GB,8.0,96.0,768.0,"{'Gpus': [{'MemoryInfo': {'SizeInMiB': 32768}}]}",31.2,,us-east-1,a,x86_64
g6f.large,L4,0.125,2.0,8.0,,0.2,,us-east-1,a,x86_64
odd.large,V100,many,2.0,8.0,,0.2,,us-east-1,a,x86_64
"""
AZURE = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Generation
Standard_NC24s_v3,V100,4.0,24.0,448.0,V100,12.24,1.2,eastus,gen1
Standard_ND96,MI300X,8.0,96.0,1900.0,MI300X,48.0,,eastus,gen2
"""


class TestSkypilot:
    """The catalog that SkyPilot keeps on this disk; the rows have the format of version 8."""

    def test_machines_with_gpus_are_listed_with_and_without_spot(self, machines: Machines) -> None:
        machines.catalog("aws", AWS)
        machines.catalog("azure", AZURE)
        machines.catalog("gcp", "not,a\ncatalog,\n")
        machines.catalog("old", AZURE, version="v9")
        machines.catalog("copy", AZURE, version="v9.2026-01")
        assert shown()[1:] == [
            "aws-16gb-v100-4g-us-east-1 aws us-east-1 V100 12.24",
            "aws-16gb-v100-4g-us-east-1-spot aws us-east-1 V100 3.70",
            "aws-32gb-v100-8g-us-east-1 aws us-east-1 V100 31.20",
            "azure eastus 8 x MI300X 48.00",
            "azure-16gb-v100-4g-eastus azure eastus V100 12.24",
            "azure-16gb-v100-4g-eastus-spot azure eastus V100 1.20",
        ]
        assert len(shown("--cloud", "AZURE", "--gpu", "v100")) == 2
        assert Machine.parse(shown("--cloud", "azure", "--gpu", "v100")[1].split()[0]).is_spot

    def test_a_long_catalog_is_cut_and_the_rest_is_counted(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inventory, "MAX_CATALOG_ROWS", 2)
        machines.catalog("aws", AWS)
        assert len(shown()) == 3
        result = CliRunner().invoke(app, ["vm", "list"])
        assert "1 more of SkyPilot's catalog are not shown" in result.stderr
        assert listed()["left_out"] == 1

    def test_a_price_is_the_users_own_or_that_of_the_cheapest_offer(self, machines: Machines) -> None:
        spot = "aws-16gb-v100-4g-us-east-1-spot"
        assert inventory.price_of(spot, is_rented=True) is None
        row = AWS.splitlines()[2]
        machines.catalog(
            "aws", AWS + "".join(f"{row}\n".replace("3.7", price) for price in ("nan", "3.5", "5"))
        )
        assert inventory.price_of(spot, is_rented=True) == 3.5
        assert inventory.price_of(spot, is_rented=False) is None, (
            "SkyPilot's price is that of SkyPilot's machines"
        )
        machines.own(f"vms:\n- vm: {spot}\n  price: 2\n- vm: rack-80gb-h100-8g-berlin\n")
        assert inventory.price_of(spot, is_rented=True) == inventory.price_of(spot, is_rented=False) == 2.0
        assert inventory.price_of("rack-80gb-h100-8g-berlin", is_rented=False) is None
        assert [vm["price"] for vm in listed("--cloud", "aws", "--gpu", "v100")["vms"]] == [
            2.0,
            12.24,
            3.5,
            31.2,
        ]
        machines.own("vms:\n- vm: x\n  price: -1\n")
        assert inventory.price_of(spot, is_rented=True) == 3.5

    def test_a_damaged_catalog_ends_no_job(self, machines: Machines) -> None:
        spot = "aws-16gb-v100-4g-us-east-1-spot"
        rows = [AWS.splitlines()[2].replace("4.0,", f"{count},", 1) for count in ("inf", "nan", "1e999")]
        rows.append(AWS.splitlines()[2].replace("V100,", f"V100-{'9' * 5_000}GB,", 1))
        machines.catalog("aws", AWS + "\n".join(rows) + "\n")
        assert inventory.price_of(spot, is_rented=True) == 3.7
        machines.catalog("azure", AZURE + "x" * 200_000 + "\n")
        assert inventory.price_of("azure-16gb-v100-4g-eastus", is_rented=True) is None
        assert "is not a table" in listed()["problems"][0]

    def test_a_skypilot_without_a_catalog_is_reported(self, machines: Machines) -> None:
        machines.program("sky", "")
        assert "Run `sky show-gpus` to download it" in listed()["problems"][0]

    def test_a_filter_without_a_match_is_reported(self, machines: Machines) -> None:
        result = CliRunner().invoke(app, ["vm", "list", "--cloud", "mars"])
        assert (result.exit_code, result.stdout) == (0, "")
        assert "No machine matches" in result.stderr
