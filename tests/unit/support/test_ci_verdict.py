"""A run in CI fails on what a developer's machine may do: skip, and run a failed test again."""

from __future__ import annotations

import pytest

pytest_plugins = ("pytester",)

SKIPPED = """
import pytest

def test_passes():
    pass

@pytest.mark.skipif(True, reason={reason!r})
def test_skipped():
    pass
"""


@pytest.fixture(autouse=True)
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI_LACKS", raising=False)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest('pytest_plugins = ("support.ci_verdict",)')


def result(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest("-p", "no:cacheprovider", *arguments)


def test_a_skip_that_nobody_agreed_to_fails_the_run_and_is_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPPED.format(reason="this machine was busy"))
    found = result(pytester)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["*not accepted in CI*", "*::test_skipped: skipped: this machine was busy"])


def test_a_developers_machine_skips_as_it_must(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    pytester.makepyfile(SKIPPED.format(reason="this machine was busy"))
    assert result(pytester).ret == pytest.ExitCode.OK


def test_a_failure_that_is_expected_fails_the_run_all_the_same(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.xfail(reason="some day")
        def test_fails():
            assert False
        """
    )
    found = result(pytester)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["*::test_fails: a failure that is expected: some day"])


def test_a_skip_with_a_reason_on_the_list_is_told_with_its_leave(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPPED.format(reason="the recorded sessions are not there"))
    found = result(pytester)
    assert found.ret == pytest.ExitCode.OK
    found.stdout.fnmatch_lines(
        ["*skipped with leave*", "the recorded sessions are not there: recordings are not part*"]
    )


@pytest.mark.parametrize(("lacking", "ret"), [("h2load strace", pytest.ExitCode.OK), ("h2load", 1), ("", 1)])
def test_a_program_may_be_missing_only_where_ci_could_not_install_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, lacking: str, ret: int
) -> None:
    monkeypatch.setenv("CI_LACKS", lacking)
    pytester.makepyfile(SKIPPED.format(reason="needs strace to inject the error"))
    assert result(pytester).ret == ret


def test_a_module_that_is_skipped_as_a_whole_is_no_exception(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\npytest.skip('not today', allow_module_level=True)")
    found = result(pytester)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["*skipped: not today"])


def test_a_test_that_was_run_again_fails_the_run(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        pytest_plugins = ("support.ci_verdict",)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item):
            report = yield
            if report.failed:
                report.outcome = "rerun"  # as plugins that run tests again have it
            return report
        """
    )
    pytester.makepyfile("def test_flaky():\n    assert False\n\ndef test_sound():\n    pass")
    found = result(pytester)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["*::test_flaky: run again after a failure"])


def test_several_processes_come_to_the_same_verdict(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SKIPPED.format(reason="this machine was busy"))
    found = result(pytester, "-p", "xdist.plugin", "-n", "2")
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines(["*::test_skipped: skipped: this machine was busy"])
