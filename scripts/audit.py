"""The report of `make audit`, from pip-audit's JSON: known vulnerabilities, and what was not looked up."""

import json
import sys
from typing import Any


def report(audited: dict[str, Any]) -> tuple[str, int]:
    """Describe a result of pip-audit.

    Args:
        audited: Its JSON.

    Returns:
        The text, and the exit status: 1 where a package has a vulnerability, or only some packages were looked up.
    """
    packages = audited["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, known) for package in packages for known in package.get("vulns", ())]
    if len(skipped) == len(packages):
        return f"Skipped: the database that pip-audit reaches has none of the {len(packages)} packages.", 0
    lines = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'none'}"
        for package, known in found
    ]
    lines.append(f"{len(packages) - len(skipped)} of {len(packages)} packages looked up, {len(found)} vulnerabilities.")
    if skipped:
        lines.append(f"Not looked up: {', '.join(skipped)}")
    return "\n".join(lines), int(bool(found or skipped))


if __name__ == "__main__":
    text = sys.stdin.read()
    message, status = report(json.loads(text)) if text.strip() else ("Skipped: pip-audit has no result.", 0)
    print(message)
    raise SystemExit(status)
