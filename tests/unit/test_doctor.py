"""epcomm.doctor: cards of made-up /sys trees, remedies, deadlines, and the live self-tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epcomm.doctor import guard, ibgda, ladder, machine, nics, probes, selftest
from epcomm.doctor.gpus import DriverError, Gpu, _no_gpus, describe_doorbells, describe_peers
from epcomm.doctor.report import ABSENT, BROKEN, NOTE, OK, Finding, exit_status, to_json, to_text
from epcomm.fabric.abi import transports

ROCE_V2 = "0000:0000:0000:0000:0000:ffff:0a00:0001"
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


def add_card(sysfs: Path, name: str, state: str = "4: ACTIVE", link: str = "Ethernet", **how):
    """A card as Linux shows it, on the PCI bus unless ``software``."""
    card = sysfs / "class" / "infiniband" / name
    port = card / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs" / "types").mkdir(parents=True)
    for file, text in {"state": state, "link_layer": link, "rate": "400 Gb/sec"}.items():
        (port / file).write_text(text + "\n")
    for index, gid in enumerate(how.get("gids", [EMPTY, ROCE_V2])):
        (port / "gids" / str(index)).write_text(gid + "\n")
        if gid != EMPTY:
            (port / "gid_attrs" / "types" / str(index)).write_text("RoCE v2\n")
    verbs = sysfs / "class" / "infiniband_verbs" / f"uverbs_{name}"
    verbs.mkdir(parents=True)
    (verbs / "ibdev").write_text(name + "\n")
    if not how.get("software"):
        device = sysfs / "devices" / "pci0000:10" / "0000:1b:00.0"
        driver = sysfs / "bus" / "pci" / "drivers" / "mlx5_core"
        device.mkdir(parents=True)
        driver.mkdir(parents=True)
        (device / "numa_node").write_text("1\n")
        (device / "driver").symlink_to(driver)
        (card / "device").symlink_to(device)


def describe(sysfs: Path, present: bool = True) -> dict[str, Finding]:
    devices = sysfs / "dev"
    devices.mkdir(exist_ok=True)
    for entry in (sysfs / "class" / "infiniband_verbs").glob("*"):
        if present:
            (devices / entry.name).touch()
    found = nics.describe_nics(nics.read_nics(sysfs), sysfs, devices)
    return {finding.name: finding for finding in found}


def test_card_with_an_address_is_described(tmp_path):
    add_card(tmp_path, "mlx5_0")
    found = describe(tmp_path)
    assert [f.status for f in found.values()] == [OK, OK]
    assert found["mlx5_0"].text == "PCIe 0000:1b:00.0, driver mlx5_core, NUMA node 1"
    assert found["mlx5_0:1"].text == (f"Ethernet, ACTIVE, 400 Gb/sec; GIDs: 1 {ROCE_V2} RoCE v2")


def test_software_card_has_no_place(tmp_path):
    add_card(tmp_path, "rxe0", software=True)
    (card,) = nics.read_nics(tmp_path)
    assert (card.driver, card.pci, card.numa) == ("", "", -1)
    assert describe(tmp_path)["rxe0"].text == "in software, NUMA node unknown"


def test_no_card_is_absent_not_broken(tmp_path):
    (found,) = describe(tmp_path).values()
    assert found.status == ABSENT
    assert "rdma_rxe" in found.remedy


@pytest.mark.parametrize(
    ("how", "name", "status", "remedy"),
    [
        ({"state": "1: DOWN"}, "mlx5_0:1", NOTE, "check the cable"),
        ({"state": "2: INIT", "link": "InfiniBand"}, "mlx5_0:1", NOTE, "subnet manager"),
        ({"gids": [EMPTY, EMPTY]}, "mlx5_0:1", BROKEN, "ip addr add"),
    ],
)
def test_port_that_cannot_be_used_has_a_remedy(tmp_path, how, name, status, remedy):
    add_card(tmp_path, "mlx5_0", **how)
    found = describe(tmp_path)[name]
    assert found.status == status
    assert remedy in found.remedy


def test_card_hidden_from_a_container_is_broken(tmp_path):
    add_card(tmp_path, "mlx5_0")
    found = describe(tmp_path, present=False)["mlx5_0"]
    assert found.status == BROKEN
    assert "--device /dev/infiniband" in found.remedy


@pytest.mark.parametrize(("has_nic", "status"), [(True, BROKEN), (False, ABSENT)])
def test_missing_module_matters_only_with_a_card(tmp_path, has_nic, status):
    found = {f.name: f for f in nics.probe_modules(has_nic, False, tmp_path)}
    assert found["ib_uverbs"].status == status
    assert found["ib_uverbs"].remedy == "modprobe ib_uverbs"
    assert found["rdma_rxe"].status == ABSENT
    (tmp_path / "module" / "ib_uverbs").mkdir(parents=True)
    found = {f.name: f for f in nics.probe_modules(has_nic, False, tmp_path)}
    assert found["ib_uverbs"].status == OK


def test_gpus_without_driver_are_broken_only_where_there_are_gpus(tmp_path):
    error = DriverError("no NVIDIA driver library (libcuda.so.1)")
    assert _no_gpus(error, tmp_path).status == ABSENT
    (tmp_path / "nvidia0").touch()
    found = _no_gpus(error, tmp_path)
    assert found.status == BROKEN
    assert found.remedy


def test_gpus_that_do_not_reach_each_other_are_named():
    gpus = [Gpu(i, "x", "sm_90", "", True, peers) for i, peers in enumerate([(1,), (0,), ()])]
    found = describe_peers(gpus)
    assert (found.status, found.text) == (NOTE, "no access between 0-2, 1-2")
    assert describe_peers(gpus[:2]).status == OK


@pytest.mark.parametrize(
    ("dwords", "status"),
    [('"PeerMappingOverride=1;"', OK), ('""', NOTE), ('"PeerMappingOverride=0;"', NOTE)],
)
def test_doorbells_that_the_driver_does_not_map_are_noted(tmp_path, dwords, status):
    params = tmp_path / "params"
    params.write_text(f"ResmanDebugLevel: 4294967295\nRegistryDwords: {dwords}\n")
    found = describe_doorbells(params)
    assert found.status == status
    assert status == OK or "NVreg_RegistryDwords" in found.remedy
    assert describe_doorbells(tmp_path / "none").status == NOTE


@pytest.mark.parametrize(("has_card", "status"), [(True, BROKEN), (False, ABSENT)])
def test_missing_libmlx5_matters_only_with_a_connectx(tmp_path, has_card, status, monkeypatch):
    def find(name):
        raise OSError(name)

    monkeypatch.setattr(nics.ctypes, "CDLL", find)
    if has_card:
        add_card(tmp_path, "mlx5_0")
    found = {f.name: f for f in nics.probe_modules(has_card, False, tmp_path)}["libmlx5"]
    assert found.status == status
    assert "ibverbs-providers" in found.remedy


def test_mpirun_of_another_mpi_is_broken(tmp_path, monkeypatch):
    """Every rank would be alone in its world."""
    launcher = tmp_path / "mpirun"
    launcher.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.6'\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), os.pathsep)
    monkeypatch.setattr(machine, "_mpi4py", lambda: ("4.1 over MPICH", "MPICH"))
    found = {f.name: f for f in machine.probe_mpi()}
    assert found["launcher"].text == f"{launcher} (Open MPI)"
    assert found["mpi4py"].status == BROKEN
    assert "mpirun of MPICH first on PATH" in found["mpi4py"].remedy


def test_missing_launcher_is_absent(monkeypatch):
    monkeypatch.setattr(machine, "_mpi4py", lambda: ("", ""))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert [f.status for f in machine.probe_mpi()] == [ABSENT, ABSENT]


def fail(how: str) -> list[Finding]:
    if how == "raises":
        raise OSError("no such thing")
    if how == "hangs":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "text"),
    [("raises", "no such thing"), ("hangs", "did not end in 0.5 s"), ("crashes", "exit code -9")],
)
@pytest.mark.timeout(20)
def test_failing_probe_becomes_a_finding_with_its_remedy(how, text):
    started = time.monotonic()
    (found,) = guard.findings_within(0.5 if how == "hangs" else 10.0, "t", "do this", fail, how)
    assert time.monotonic() - started < 10
    assert (found.status, found.remedy) == (BROKEN, "do this")
    assert text in found.text


@pytest.mark.parametrize("transport", ["local", "emulated"])
@pytest.mark.timeout(60)
def test_transport_is_tried_with_good_and_bad_operations(transport):
    found = selftest.run_self_test(selftest.SelfTest(transport, transport, "", "remedy"))
    assert [f.status for f in found] == [OK, OK, OK], found
    assert "512 KiB and a signal each way" in found[0].text
    assert all("refused: fabric: the transport failed" in f.text for f in found[1:])


@pytest.mark.timeout(60)
def test_transport_that_cannot_be_made_is_broken_with_its_remedy():
    found = selftest.run_self_test(selftest.SelfTest("x", "nothing", "", "install it"))
    assert [(f.status, f.remedy) for f in found] == [(BROKEN, "install it")]
    assert 'no transport "nothing"' in found[0].text


@pytest.mark.timeout(60)
def test_bad_operation_that_goes_through_is_broken(monkeypatch):
    """A transport that reports no error fails the self-test."""
    monkeypatch.setattr(selftest, "SOON", 0.5)
    monkeypatch.setattr(selftest, "BAD_PLACES", {"a good place": selftest.Place(selftest._IN, 0)})
    found = selftest.run_self_test(selftest.SelfTest("local", "local", "", "remedy"))
    assert [f.status for f in found] == [OK, BROKEN]
    assert "reported by nobody" in found[1].text


def test_self_tests_are_of_what_is_here(tmp_path):
    add_card(tmp_path, "mlx5_0")
    cards = nics.read_nics(tmp_path)
    gpu = Gpu(0, "x", "sm_90", "", True, ())
    known = ("local", "local-cuda", "verbs", "mlx5")
    tests = probes.self_tests([gpu], cards, known, True)
    names = ["local", "local-cuda", "verbs mlx5_0:1", "ibgda mlx5_0:1"]
    assert [test.name for test in tests] == names
    assert all("nic=mlx5_0:1" in test.arguments for test in tests[2:])
    assert [(test.direct, test.on_gpu) for test in tests[2:]] == [(False, False), (True, True)]
    # Without a GPU, or kernels for it, a thread of the host fills the queues.
    assert not probes.self_tests([], cards, known, True)[-1].on_gpu
    assert not probes.self_tests([gpu], cards, known, False)[-1].on_gpu
    assert [test.name for test in probes.self_tests([], [], known)] == ["local"]
    assert [test.name for test in probes.self_tests([gpu], cards, ("local",))] == ["local"]


def test_ladder_says_why_not_each_faster_fabric(tmp_path):
    add_card(tmp_path, "mlx5_0")
    cards = nics.read_nics(tmp_path)
    gpu = Gpu(0, "x", "sm_90", "", True, ())
    good, bad = (Finding("t", "verbs mlx5_0:1", status, "", "r") for status in (OK, BROKEN))
    fast, slow = (Finding("t", "ibgda mlx5_0:1", *how) for how in ((OK, ""), (BROKEN, "x", "do y")))
    all_transports = ("mlx5", "verbs")

    def climb(gpus, cards, names, tests, mpi=True, kernels=True):
        rungs, line = ladder.climb(ladder.Facts(gpus, cards, names, tests, mpi, kernels))
        assert all(rung.remedy for rung in rungs if rung.status != OK)
        return line.removeprefix("fastest fabric between nodes here: "), rungs

    nothing = "(ibgda: no GPU; proxy/verbs: no RDMA network card)"
    assert climb([], [], ("verbs",), [])[0] == f"mpi {nothing}"
    assert climb([], [], (), [], mpi=False)[0].startswith("gloo, by a torch.distributed group (")
    line, rungs = climb([gpu], cards, all_transports, [good, fast])
    assert line == "ibgda"
    assert [rung.status for rung in rungs] == [OK, OK, OK]
    line, rungs = climb([gpu], cards, all_transports, [good, slow])
    assert line.startswith("proxy/verbs (ibgda: its self-test failed on every port; ibgda mlx5_0")
    assert (rungs[0].status, rungs[0].remedy) == (BROKEN, "do y")
    assert climb([gpu], cards, ("verbs",), [good])[0] == (
        "proxy/verbs (ibgda: this build of the library has no such transport)"
    )
    assert "built without kernels" in climb([gpu], cards, all_transports, [], kernels=False)[0]
    assert "self-test failed" in climb([gpu], cards, ("verbs",), [bad])[0]
    assert "proxy/verbs: this build of the library" in climb([gpu], cards, (), [])[0]
    assert "ConnectX" in climb([gpu], [], all_transports, [])[1][0].remedy


def test_forced_errors_that_work_do_not_make_a_port_work():
    refused = [Finding("t", "ibgda mlx5_0:1, a bad key", OK, "refused")]
    facts = ladder.Facts([], [], ("mlx5",), refused, False, True)
    assert ladder._tested("ibgda", facts, "ibgda ").status == BROKEN


@pytest.mark.timeout(60)
def test_card_that_is_not_there_fails_the_ibgda_self_test_with_its_reason():
    test = selftest.SelfTest("ibgda x", "mlx5", "nic=mlx5_99", "the reason says", direct=True)
    (found,) = ibgda.run_ibgda_test(test)
    assert (found.status, found.remedy) == (BROKEN, "the reason says")
    assert "FabricError" in found.text


def test_report_ends_with_the_verdict():
    findings = [Finding("a", "b", OK, "fine"), Finding("a", "c", BROKEN, "bad", "mend it")]
    lines = to_text(findings, "the verdict").splitlines()
    assert lines[-1] == "the verdict"
    assert any("remedy: mend it" in line for line in lines)
    document = json.loads(to_json(findings, "the verdict"))
    assert document["exit_status"] == exit_status(findings) == 1
    assert document["findings"][1] == {
        "topic": "a",
        "name": "c",
        "status": BROKEN,
        "text": "bad",
        "remedy": "mend it",
    }
    assert exit_status(findings[:1]) == 0


@pytest.mark.timeout(110)
def test_program_prints_json_and_its_status():
    command = [sys.executable, "-m", "epcomm.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_status"], done.stderr
    found = {f["name"]: f for f in document["findings"]}
    assert found["transports"]["text"] == ", ".join(transports)
    assert found["local"]["status"] == found["emulated"]["status"] == OK, done.stdout
    assert document["verdict"].startswith("fastest fabric between nodes here: ")
