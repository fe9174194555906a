"""RDMA network cards, as the kernel describes them."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from .report import ABSENT, BROKEN, NOTE, OK, Finding

TOPIC = "network cards"


@dataclass(frozen=True)
class Gid:
    """An entry of a port's table of addresses; ``kind`` such as "RoCE v2"."""

    index: int
    text: str
    kind: str


@dataclass(frozen=True)
class Port:
    """A port of a card; ``state`` such as "ACTIVE", ``link`` "InfiniBand" or "Ethernet"."""

    number: int
    state: str
    link: str
    rate: str
    gids: tuple[Gid, ...]


@dataclass(frozen=True)
class Nic:
    """A card. ``pci`` and ``driver`` are empty for one in software; ``numa`` is -1 if unknown."""

    name: str
    driver: str
    pci: str
    numa: int
    ports: tuple[Port, ...]

    @property
    def active(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.state == "ACTIVE")


def _line(path: Path) -> str:
    # An unused entry of the table of addresses has no type: reading it is an error.
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _read_gids(port: Path) -> tuple[Gid, ...]:
    gids = []
    for entry in _numbered(port / "gids"):
        text = _line(entry)
        if text.replace(":", "").strip("0"):
            kind = _line(port / "gid_attrs" / "types" / entry.name)
            gids.append(Gid(int(entry.name), text, kind))
    return tuple(gids)


def _read_port(port: Path) -> Port:
    return Port(
        int(port.name),
        _line(port / "state").partition(": ")[2],
        _line(port / "link_layer"),
        _line(port / "rate"),
        _read_gids(port),
    )


def read_nics(sysfs: Path = Path("/sys")) -> list[Nic]:
    """All cards below ``sysfs``, by name."""
    root = sysfs / "class" / "infiniband"
    nics = []
    for card in sorted(root.iterdir()) if root.is_dir() else []:
        device = card / "device"
        driver, numa = device / "driver", _line(device / "numa_node")
        nics.append(
            Nic(
                card.name,
                driver.resolve().name if driver.exists() else "",
                device.resolve().name if device.exists() else "",
                int(numa) if numa else -1,
                tuple(_read_port(port) for port in _numbered(card / "ports")),
            )
        )
    return nics


def _has_verbs_device(nic: Nic, sysfs: Path, devices: Path) -> bool:
    """Whether the card's /dev/infiniband/uverbs* is here."""
    for entry in (sysfs / "class" / "infiniband_verbs").glob("uverbs*"):
        if _line(entry / "ibdev") == nic.name:
            return (devices / entry.name).exists()
    return False


def describe_nics(nics: list[Nic], sysfs: Path, devices: Path) -> list[Finding]:
    """A finding for every card and port."""
    if not nics:
        text = "none in /sys/class/infiniband"
        remedy = (
            "if there is one: load its driver (such as mlx5_ib); to try without: "
            "modprobe rdma_rxe; rdma link add rxe0 type rxe netdev INTERFACE"
        )
        return [Finding(TOPIC, "devices", ABSENT, text, remedy)]
    findings = []
    for nic in nics:
        place = f"PCIe {nic.pci}, driver {nic.driver}" if nic.pci else "in software"
        text = f"{place}, NUMA node {nic.numa if nic.numa >= 0 else 'unknown'}"
        if _has_verbs_device(nic, sysfs, devices):
            findings.append(Finding(TOPIC, nic.name, OK, text))
        else:
            remedy = "modprobe ib_uverbs; containers: --device /dev/infiniband"
            text += "; its /dev/infiniband/uverbs device is missing"
            findings.append(Finding(TOPIC, nic.name, BROKEN, text, remedy))
        findings += [_describe_port(nic, port) for port in nic.ports]
    return findings


def _describe_port(nic: Nic, port: Port) -> Finding:
    name = f"{nic.name}:{port.number}"
    text = f"{port.link}, {port.state}, {port.rate}"
    if port.state != "ACTIVE":
        remedy = "check the cable and the link"
        if port.link == "InfiniBand":
            remedy += ", and that a subnet manager runs"
        return Finding(TOPIC, name, NOTE, text, remedy)
    gids = "; ".join(f"{gid.index} {gid.text} {gid.kind}".strip() for gid in port.gids)
    if port.link == "Ethernet" and not port.gids:
        remedy = "give its network interface an address: ip addr add ADDRESS dev INTERFACE"
        return Finding(TOPIC, name, BROKEN, f"{text}; no GID", remedy)
    return Finding(TOPIC, name, OK, f"{text}; GIDs: {gids or 'none'}")


def probe_modules(has_nic: bool, has_gpu: bool, sysfs: Path = Path("/sys")) -> list[Finding]:
    """What of the kernel and of libibverbs RDMA needs, where it could be used.

    Args:
        has_nic: there is a network card.
        has_gpu: there is a GPU.
        sysfs: the kernel's tree.
    """
    topic = "kernel and libibverbs"
    remedies = {
        "ib_uverbs": (has_nic, "modprobe ib_uverbs"),
        "nvidia_peermem": (
            False,
            "modprobe nvidia_peermem, where dma-buf does not work" if has_nic and has_gpu else "",
        ),
        "rdma_rxe": (False, "modprobe rdma_rxe, for RDMA over any interface, slowly"),
    }
    findings = []
    for module, (needed, remedy) in remedies.items():
        if (sysfs / "module" / module).is_dir():
            findings.append(Finding(topic, module, OK, "loaded or built in"))
        else:
            status = BROKEN if needed else ABSENT
            findings.append(Finding(topic, module, status, "not loaded", remedy))
    return [*findings, _find_libibverbs(topic, has_nic), _find_libmlx5(topic, sysfs)]


def _find_libmlx5(topic: str, sysfs: Path) -> Finding:
    has_mlx5 = any(nic.driver.startswith("mlx5") for nic in read_nics(sysfs))
    try:
        ctypes.CDLL("libmlx5.so.1")
    except OSError:
        remedy = "for IBGDA install rdma-core (Debian: ibverbs-providers)"
        return Finding(topic, "libmlx5", BROKEN if has_mlx5 else ABSENT, "not found", remedy)
    return Finding(topic, "libmlx5", OK, "is here")


def _find_libibverbs(topic: str, has_nic: bool) -> Finding:
    try:
        library = ctypes.CDLL("libibverbs.so.1")
    except OSError:
        remedy = "install rdma-core (Debian: libibverbs1 and ibverbs-providers)"
        status = BROKEN if has_nic else ABSENT
        return Finding(topic, "libibverbs", status, "not found", remedy)
    if hasattr(library, "ibv_reg_dmabuf_mr"):
        return Finding(topic, "libibverbs", OK, "can register dma-bufs")
    remedy = "install rdma-core 34 or newer"
    return Finding(topic, "libibverbs", NOTE, "cannot register dma-bufs of GPU memory", remedy)
