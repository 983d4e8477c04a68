import signal
import threading

import pytest

from milpy.interrupt import HeldInterrupt


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_held_interrupt_waits_for_its_check() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupt() as interrupt:
        press()
        steps.append("after the key")
        interrupt.check()
        steps.append("never")
    assert steps == ["after the key"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_nobody_checked_is_raised_on_leaving() -> None:
    with pytest.raises(KeyboardInterrupt), HeldInterrupt():
        press()


def test_the_second_key_is_not_held() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldInterrupt():
        press()
        steps.append(1)
        press()
        steps.append(2)
    assert steps == [1]


def test_an_error_inside_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="first"), HeldInterrupt():
        press()
        raise ValueError("first")


def test_a_handler_of_the_callers_own_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with HeldInterrupt() as interrupt:
            press()
            assert not interrupt.pending
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def test_other_threads_hold_nothing() -> None:
    held = []

    def work() -> None:
        with HeldInterrupt() as interrupt:
            held.append(interrupt._is_held)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert held == [False]
