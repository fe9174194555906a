"""``python -m epcomm.doctor [--json]``: look at this machine, and say what to repair."""

import argparse
import sys

from .probes import examine
from .report import exit_status, to_json, to_text


def main() -> int:
    """Print the report; the exit status is 1 when something that is present is broken."""
    parser = argparse.ArgumentParser(prog="python -m epcomm.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    findings, verdict = examine()
    sys.stdout.write((to_json if options.json else to_text)(findings, verdict) + "\n")
    return exit_status(findings)


if __name__ == "__main__":
    sys.exit(main())
