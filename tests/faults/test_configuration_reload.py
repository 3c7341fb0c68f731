"""F4: the configuration is read anew while the server decides, and broken in every way first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from support.bare_server import admin_channel
from support.harness import eventually
from support.server_group import Callers, Group, server_group

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb

GOOD = "[guards]\nmax_notional = 1000.0\n"
BROKEN = {
    "not TOML": "[guards\n",
    "half-written": GOOD[: len(GOOD) // 2],
    "an unknown key": "[guards]\nmax_nominal = 5.0\n",
    "an unknown section": "[guard]\nmax_notional = 5.0\n",
    "a wrong type": "[guards]\nmax_notional = 'much'\n",
    "a negative limit": "[guards]\nmax_notional = -5.0\n",
    "not UTF-8": "[guards]\nmax_notional = 5.0 # \udcff\n",
    "what needs a restart": "[admission]\nmax_in_flight = 7\n",
}


def reload(group: Group, **changes: object) -> admin_pb2.ReloadConfigurationResponse:
    request = admin_pb2.ReloadConfigurationRequest(author="ann", reason="limits", **changes)  # type: ignore[arg-type]
    with admin_channel(group.env) as channel:
        return admin_pb2_grpc.AdminServiceStub(channel).ReloadConfiguration(request, timeout=10.0)


def hashes(group: Group) -> set[str]:
    """Of the configuration in force, by every process."""
    status = eventually(
        group.status, lambda status: len(status.processes) == 2 and not any(one.problem for one in status.processes)
    )
    return {one.config_hash for one in status.processes}


def replace(path: Path, content: str) -> None:
    """As an editor or a config map does: by a symbolic link to another file."""
    other = path.with_name(f"version-{time.monotonic_ns()}.toml")
    other.write_bytes(content.encode(errors="surrogateescape"))
    link = path.with_name("link")
    link.symlink_to(other)
    link.replace(path)


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.fault(
    "F4",
    "The configuration file is broken in nine ways at a reload, then repaired",
    "The old configuration stays in force as a whole, until the repaired one replaces it for all calls.",
)
def test_a_broken_file_changes_nothing_and_a_sound_one_holds_in_every_process(
    tmp_path: Path, seen: Callable[[str], None]
) -> None:
    path = tmp_path / "pretrade.toml"
    replace(path, "")
    with server_group(tmp_path, 2, PRETRADE_CONFIG_FILE=str(path)) as group:
        before = hashes(group)
        assert len(before) == 1
        control_version = eventually(lambda: group.status().control_version, bool)  # of the first trading state
        with Callers(group.decision, count=2) as callers:
            for name, content in BROKEN.items():
                replace(path, content)
                with pytest.raises(grpc.RpcError) as refused:
                    reload(group)
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, name
            if os.geteuid() != 0:
                path.chmod(0)
            else:
                path.unlink()  # who is root may read everything
            with pytest.raises(grpc.RpcError):
                reload(group)
            path.unlink(missing_ok=True)
            assert hashes(group) == before
            assert group.status().control_version == control_version
            assert "configuration not reloaded" in group.log()

            replace(path, GOOD)
            tried = reload(group, dry_run=True)
            assert "guards.max_notional: 1000000.0 → 1000.0" in tried.change.diff
            assert hashes(group) == before
            began = time.monotonic()
            made = reload(group, expected_config_hash=tried.previous_config_hash)
            eventually(lambda: hashes(group), {made.config_hash}.__eq__)
            took = time.monotonic() - began
            with pytest.raises(grpc.RpcError) as outdated:
                reload(group, expected_config_hash=tried.previous_config_hash)
            assert outdated.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            callers.wait_for_more(20)
            changed = len(callers.decisions)
            callers.wait_for_more(50)
        assert callers.errors == []
        assert all(pb.REASON_CODE_NOTIONAL_LIMIT not in one.reasons for one in callers.decisions[:50])
        after = callers.decisions[changed:]
        assert all(one.control_version == made.change.version for one in after)
        seen(f"{len(BROKEN) + 1} broken files refused, {len(callers.decisions)} decisions, none failed")
        seen(f"the sound one in both processes after {took:.2f} s")
        assert group.stop() == 0
    settings = [json.loads(line) for line in group.log().splitlines() if '"change"' in line and "max_notional" in line]
    assert len(settings) >= 2, "each process says what changed"
