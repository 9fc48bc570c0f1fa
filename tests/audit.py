"""Known holes of the packages that are installed, asked of the index's advisories: `make audit`.

Exit status 1 for a known hole. Where nobody answers, as without a network, it says for how many nothing is known, and 0.
"""

import json
import subprocess
import sys


def report(dependencies: list[dict]) -> tuple[int, str]:
    """pip-audit's JSON "dependencies" -> exit status and what to print."""
    holes = [f"{d['name']} {d['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version'}"
             for d in dependencies for v in d.get("vulns", [])]
    unknown = [d["name"] for d in dependencies if "skip_reason" in d]
    lines = [*holes, f"{len(dependencies) - len(unknown)} packages scanned, {len(holes)} known holes"]
    if unknown:
        lines.append(f"NOT scanned, no advisories answer for them: {len(unknown)} ({', '.join(unknown[:5])} ...)")
    return int(bool(holes)), "\n".join(lines)


def main(pins: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", pins, "--no-deps", "--disable-pip", "--format", "json",
               "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        status, text = report(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines() or ["it gave no reason"]
        status, text = 0, f"NOT scanned, pip-audit failed: {said[-1]}"
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
