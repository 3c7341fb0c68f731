from __future__ import annotations

import pytest

from server.admission import Admission, AdmissionSettings
from server.errors import DrainingError, OverloadedError


def test_calls_beyond_the_limit_are_shed_and_counted() -> None:
    admission = Admission(AdmissionSettings(max_in_flight=2))
    with admission, admission:
        with pytest.raises(OverloadedError) as caught, admission:
            raise AssertionError("admitted")
        assert caught.value.reason == "TOO_MANY_IN_FLIGHT"
        assert (admission.in_flight, admission.shed) == (2, 1)
    assert admission.in_flight == 0
    with admission:
        assert admission.in_flight == 1


def test_a_call_that_fails_gives_its_place_back() -> None:
    admission = Admission(AdmissionSettings(max_in_flight=1))
    with pytest.raises(ZeroDivisionError), admission:
        raise ZeroDivisionError
    assert admission.in_flight == 0


def test_a_draining_server_admits_nothing_new_and_lets_the_rest_finish() -> None:
    admission = Admission(AdmissionSettings())
    with admission:
        admission.draining = True
        with pytest.raises(DrainingError), admission:
            raise AssertionError("admitted")
        assert (admission.in_flight, admission.shed) == (1, 0)
    assert admission.in_flight == 0
