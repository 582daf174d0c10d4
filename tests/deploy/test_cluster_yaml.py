"""cluster.yaml: valid for Ray's launcher, installs the pinned versions, opens only SSH."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "cluster.yaml"
PLAN_SHARDS_GB = 20
IMAGE_AND_PACKAGES_GB = 80


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def leaves(value: Any) -> Iterator[str]:
    """Every scalar in a configuration, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield str(value)


def workers(config: dict[str, Any]) -> dict[str, Any]:
    types = config["available_node_types"]
    return {name: each for name, each in types.items() if name != config["head_node_type"]}


def market(node: dict[str, Any]) -> str | None:
    return node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")


def test_file_passes_the_schema_of_ray(config: dict[str, Any], schema: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, schema)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_spot"]["max_workers"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        {"min_workers": 1},
        {"worker_nodes": {}},
        {"available_node_types": {"head": {"resources": {}}}},
        {"max_workers": "four"},
    ],
)
def test_schema_reports_a_damaged_file(config: dict[str, Any], schema: dict[str, Any], damage: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, **damage}, schema)


def test_values_that_the_schema_does_not_check(config: dict[str, Any]) -> None:
    assert config["provider"]["type"] == "aws"
    assert config["head_node_type"] in config["available_node_types"]
    least = sum(each.get("min_workers", 0) for each in workers(config).values())
    assert least <= config["max_workers"]
    zones = config["provider"]["availability_zone"].split(",")
    assert all(zone.startswith(config["provider"]["region"]) for zone in zones)
    assert config["idle_timeout_minutes"] > 0


def test_cpu_head_with_a10g_workers_on_demand_and_spot(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["node_config"]["InstanceType"].startswith("m5.") and "GPU" not in head["resources"]
    types = workers(config)
    assert {each["node_config"]["InstanceType"] for each in types.values()} == {"g5.2xlarge"}
    assert all(each["resources"] == {"CPU": 8, "GPU": 1} for each in types.values())
    assert sorted(str(market(each)) for each in types.values()) == ["None", "spot"]
    (spot,) = [each for each in types.values() if market(each)]
    (lasting,) = [each for each in types.values() if not market(each)]
    assert spot["min_workers"] == 0 and spot["max_workers"] >= 1 and spot["priority"] > lasting["priority"]
    # A job is refused where there is no GPU yet, so one must be there.
    assert lasting["min_workers"] == 1


def test_every_field_to_edit_is_at_the_top_and_used_below(config: dict[str, Any]) -> None:
    text = PATH.read_text()
    top, _, below = text.partition("cluster_name:")
    comment = "\n".join(line for line in top.splitlines() if line.startswith("#"))
    assert "EDIT" in comment
    fields = config["metadata"]["edit"]
    assert len(fields) >= 8
    for name in fields:
        assert re.search(rf"\b{name}\b", comment), f"{name} is not explained at the top"
        assert f"&{name}" in top and f"*{name}" in below, f"{name} is not what the rest of the file uses"
    assert "EDIT" not in below
    marked = [name for name, value in fields.items() if "EDIT-ME" in str(value)]
    assert marked == ["image", "check_storage"]


def test_edits_reach_every_machine(config: dict[str, Any]) -> None:
    edited = yaml.safe_load(PATH.read_text().replace("ami-EDIT-ME", "ami-123").replace("disk 200", "disk 333"))
    nodes = [each["node_config"] for each in edited["available_node_types"].values()]
    assert {node["ImageId"] for node in nodes} == {"ami-123"}
    assert {node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] for node in nodes} == {333}


def test_disks_fit_the_shards_and_are_encrypted(config: dict[str, Any]) -> None:
    for node in config["available_node_types"].values():
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= IMAGE_AND_PACKAGES_GB + 2 * PLAN_SHARDS_GB
        assert disk["Ebs"]["Encrypted"] is True and disk["Ebs"]["DeleteOnTermination"] is True


def test_every_machine_has_its_role(config: dict[str, Any]) -> None:
    head = config["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]
    others = [each["node_config"]["IamInstanceProfile"] for each in workers(config).values()]
    assert head not in others, "workers must not be able to start machines"
    assert all(each["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
               for each in config["available_node_types"].values())  # fmt: skip


def test_only_ssh_is_allowed_in(config: dict[str, Any]) -> None:
    """No additional rule (Ray adds SSH and traffic among the nodes); the dashboard listens on the head's loopback."""
    assert set(config["provider"]["security_group"]) == {"GroupName"}
    assert not [text for text in leaves(config) if "0.0.0.0" in text or "::/0" in text]
    assert not [text for text in leaves(config) if text == "IpPermissions"]
    (start,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start and "--ray-client" not in start


def test_every_ray_start_requires_the_token(config: dict[str, Any]) -> None:
    (settings,) = [line for line in config["setup_commands"] if "motip-settings" in line]
    assert "RAY_AUTH_MODE=token" in settings
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"])


def test_settings_are_written_once_and_reach_ray(config: dict[str, Any], tmp_path: Path) -> None:
    """The launcher runs each command in a separate shell, and the whole set-up again on every `ray up`."""
    (settings,) = [line for line in config["setup_commands"] if "motip-settings" in line]
    (tmp_path / ".bashrc").write_text("")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for _ in range(2):
        subprocess.run(["bash", "-c", settings], env=environment, check=True)
    assert (tmp_path / ".bashrc").read_text().count("export") == 1
    script = ". ~/.bashrc; echo $RAY_AUTH_MODE $MLFLOW_DISABLE_TELEMETRY $PATH"
    shell = subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert shell.stdout.startswith(f"token true {tmp_path}/venv/bin:")


def test_jobs_use_s3_in_the_region_of_the_machines(config: dict[str, Any], tmp_path: Path) -> None:
    """Without AWS_REGION clients would use us-east-1, wherever the machines are."""
    edited = yaml.safe_load(PATH.read_text().replace("&region us-east-1", "&region eu-north-1"))
    region, commands = edited["provider"]["region"], edited["setup_commands"]
    (export,) = [line for line in commands if "AWS_REGION" in line]
    # For head and workers alike, and before the check that needs it.
    assert commands.index(export) < commands.index(edited["metadata"]["edit"]["check_storage"])
    assert region == "eu-north-1" and not [line for line in commands if "us-east-1" in line]
    (tmp_path / ".bashrc").write_text("")
    (tmp_path / "cloud-init").write_text(f'#!/bin/sh\n[ "$*" = "query v1.region" ] && echo {region}\n')
    (tmp_path / "cloud-init").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run(["bash", "-c", export], env=environment, check=True)
    assert (tmp_path / ".bashrc").read_text() == f"export AWS_REGION={region}\n"
    python = "import pyarrow.fs as fs; print(fs.S3FileSystem().region)"
    script = f'. ~/.bashrc; "{sys.executable}" -c "{python}"'
    shell = subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert shell.stdout.strip() == region, "the bucket check uses another region"


def test_machine_without_a_region_starts(config: dict[str, Any], tmp_path: Path) -> None:
    (export,) = [line for line in config["setup_commands"] if "AWS_REGION" in line]
    (tmp_path / ".bashrc").write_text("")
    (tmp_path / "cloud-init").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cloud-init").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", export], env=environment, check=True, capture_output=True, text=True)
    assert "no region from cloud-init" in done.stdout
    assert (tmp_path / ".bashrc").read_text() == ""


def test_bucket_check_distinguishes_existing_from_missing(config: dict[str, Any]) -> None:
    from tests.helpers.object_store import object_store

    check = config["metadata"]["edit"]["check_storage"].replace("~/venv/bin/python", f'"{sys.executable}"')
    with object_store() as store:
        # The client itself takes no address from the environment.
        address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
        check = check.replace("S3FileSystem()", f"S3FileSystem(endpoint_override='{address}', scheme='http')")
        for bucket, ok in ((store.uri.removeprefix("s3://"), True), ("no-such-bucket", False)):
            done = subprocess.run(["bash", "-c", check.replace("EDIT-ME", bucket)], capture_output=True, text=True)
            assert (done.returncode == 0) is ok, done.stderr
            assert ok or "NO_SUCH_BUCKET" in done.stderr


def test_nodes_install_the_lock_file_and_nothing_unpinned(config: dict[str, Any]) -> None:
    commands = [
        line
        for key, value in config.items()
        if key.endswith("_commands")
        for line in value
    ]  # fmt: skip
    installs = [line for line in commands if "pip install" in line]
    assert installs == [
        "~/venv/bin/python -m pip install --quiet --require-hashes --requirement ~/motip-requirements.lock"
    ]
    assert (ROOT / config["file_mounts"]["~/motip-requirements.lock"]).resolve() == ROOT / "requirements.lock"


def locked(name: str) -> dict[str, str]:
    """Package → version of a lock file."""
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^([\w.\-]+)==([\w.+!]+)", text, re.MULTILINE))


def declared(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize(
    ("name", "extras"),
    [("requirements.lock", ("aws",)), ("requirements-dev.lock", ("aws", "dev", "docs"))],
)
def test_lock_files_cover_all_declared_dependencies(name: str, extras: tuple[str, ...]) -> None:
    pins, needed = locked(name), declared(*extras)
    names = {each: canonicalize_name(each.name) for each in needed}
    assert [each.name for each in needed if names[each] not in pins] == []
    assert [str(each) for each in needed if not each.specifier.contains(pins[names[each]])] == []
    assert "boto3" in pins, "the launcher uses it"
    assert "pyarrow" in pins, "the check of the bucket uses it"


def test_development_lock_contains_the_pins_of_the_other_two() -> None:
    development = locked("requirements-dev.lock")
    for name in ("requirements.lock", "requirements-build.lock"):
        assert {each: pin for each, pin in locked(name).items() if development.get(each) != pin} == {}


def test_nodes_install_no_test_dependency() -> None:
    only = {canonicalize_name(each.name) for each in declared("dev", "docs")} - {each.name for each in declared("aws")}
    assert {"pytest", "mypy", "mkdocs", "moto"} <= only
    assert only & set(locked("requirements.lock")) == set()


def test_commands_parse_as_shell(config: dict[str, Any]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    for key, value in config.items():
        for line in value if key.endswith("_commands") else ():
            done = subprocess.run([bash, "-n", "-c", line], capture_output=True, text=True)
            assert done.returncode == 0, f"{line}: {done.stderr}"


def test_file_contains_no_secret_and_no_account(config: dict[str, Any]) -> None:
    text = PATH.read_text()
    assert not re.search(r"\bAKIA[0-9A-Z]{16}\b|\b[0-9]{12}\b|BEGIN [A-Z ]*PRIVATE KEY|aws_secret", text)
    assert not [line for line in leaves(config) if re.search(r"RAY_AUTH_TOKEN=", line)]
