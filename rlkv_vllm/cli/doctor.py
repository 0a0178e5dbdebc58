"""``rlkv doctor``: is everything there that serving needs?"""

from typing import Annotated

import typer

from rlkv_vllm.cli.tables import print_next


def doctor(
    port: Annotated[int, typer.Option(help="Port that the server would use.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check versions, platform, plugin, embedded model, memory and port."""
    import json
    from dataclasses import asdict

    from rlkv_vllm.serving.doctor import examine

    findings = []
    for finding in examine(port):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    ok = all(finding.ok for finding in findings)
    if as_json:
        checks = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"ok": ok, "checks": checks}, indent=2))
    elif ok:
        print_next("serve")
    else:
        typer.echo("next: repair what failed, then run rlkv doctor again")
    raise typer.Exit(0 if ok else 1)
