"""What probes find, as text and as JSON."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

#: Works; is not here; works with a restriction; is here and does not work.
OK, ABSENT, NOTE, BROKEN = "ok", "absent", "note", "broken"
_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: the group it is printed in.
        name: what was looked at.
        status: OK, ABSENT, NOTE or BROKEN.
        text: what was found.
        remedy: what to do about it; never empty for BROKEN.
    """

    topic: str
    name: str
    status: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.status in (OK, ABSENT, NOTE, BROKEN), self.status
        assert self.remedy or self.status != BROKEN, f"{self.name} is broken without a remedy"


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if something that is present is broken."""
    return int(any(finding.status == BROKEN for finding in findings))


def to_text(findings: Sequence[Finding], verdict: str) -> str:
    """Findings by topic, remedies below them, the verdict last."""
    lines: list[str] = []
    topic = ""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            lines += ["", topic] if lines else [topic]
        start = f"  {finding.status:6}  {finding.name:{width}}  "
        lines += _wrapped(start, finding.text)
        if finding.remedy:
            lines += _wrapped(" " * (len(start) - 8) + "remedy: ", finding.remedy)
    return "\n".join([*lines, "", verdict])


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(_WIDTH, len(start) + 40),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def to_json(findings: Sequence[Finding], verdict: str) -> str:
    """An object with ``findings`` (as Finding has them), ``verdict`` and ``exit_status``."""
    document = {
        "findings": [asdict(finding) for finding in findings],
        "verdict": verdict,
        "exit_status": exit_status(findings),
    }
    return json.dumps(document, indent=2)
