"""The bookkeeping of points: nothing run twice, nothing lost, whichever storage and whoever dies."""

import signal
import threading

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from tq_lightning.sweep.ledger import MAX_LOST, Ledger, alive
from tq_lightning.sweep.storage import open_storage

URLS = {"sqlite": "sqlite:///{}/study.db", "journal": "journal:{}/study.journal"}


@pytest.fixture(params=URLS)
def url(request, tmp_path):
    return URLS[request.param].format(tmp_path)


def ledger_of(url, limit=5, stale=60.0):
    study = optuna.create_study(storage=open_storage(url), study_name="s", load_if_exists=True)
    return Ledger(study, lambda point: {"x": point}, limit, stale)


def finish(ledger, trial):
    ledger.study.tell(trial.number, 1.0)


def points(ledger, *states):
    return [t.user_attrs["point"] for t in ledger.trials() if t.state in states]


def test_every_point_waits_once_and_is_claimed_once(url):
    ledger, other = ledger_of(url), ledger_of(url)
    ledger.tend()
    other.tend()
    assert points(ledger, TrialState.WAITING) == [0, 1, 2, 3, 4]
    claimed = []
    while trial := (ledger if len(claimed) % 2 else other).claim("me"):
        claimed.append(trial.user_attrs["point"])
        assert trial.system_attrs["fixed_params"] == {"x": claimed[-1]}
    assert claimed == [0, 1, 2, 3, 4] and not ledger.settled()


def test_claims_from_many_threads_do_not_meet(url):
    ledgers = [ledger_of(url, limit=16) for _ in range(3)]
    ledgers[0].tend()
    claimed: list[int] = []

    def run(ledger):
        while trial := ledger.claim("me"):
            claimed.append(trial.user_attrs["point"])
            finish(ledger, trial)

    threads = [threading.Thread(target=run, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(16)) and ledgers[0].settled()


def test_a_point_enqueued_twice_is_run_once(url):
    ledger = ledger_of(url, limit=1)
    for _ in range(2):  # as two commands do that start at the same moment
        ledger.study.enqueue_trial({"x": 0}, user_attrs={"point": 0, "attempt": 0})
    finish(ledger, ledger.claim("a"))
    assert ledger.claim("b") is None and ledger.settled()
    assert [t.state for t in ledger.trials()] == [TrialState.COMPLETE]


def test_a_silent_worker_loses_its_trial_and_a_live_one_keeps_it(url):
    ledger = ledger_of(url, limit=2, stale=0.6)
    ledger.tend()
    dead, living = ledger.claim("dead"), ledger.claim("living")
    with alive(ledger, living, None):
        for _ in range(20):
            threading.Event().wait(0.1)
            ledger.tend()
    retry = ledger.claim("next")
    assert (retry.user_attrs["point"], retry.user_attrs["attempt"], retry.user_attrs["retry_of"]) == (0, 1, dead.number)
    assert "no sign of life" in ledger.study.trials[dead.number].user_attrs["reason"]
    assert ledger.study.trials[living.number].state == TrialState.RUNNING and ledger.claim("next") is None
    finish(ledger, living), finish(ledger, retry)
    assert ledger.settled()


def test_who_fails_a_trial_may_die_before_it_enqueues_the_next(url):
    ledger = ledger_of(url, limit=1)
    ledger.tend()
    ledger.fail(ledger.claim("a"), "interrupted", "stopped")  # and no tend() after it
    other = ledger_of(url, limit=1)
    assert not other.settled()
    other.tend()
    assert other.claim("b").user_attrs["attempt"] == 1


def test_a_point_that_kills_its_workers_is_given_up(url):
    ledger = ledger_of(url, limit=1)
    for _ in range(MAX_LOST):
        ledger.tend()
        ledger.claim("w")
        assert not ledger.settled() and ledger.fail_worker("w", "lost", "its worker was killed by SIGKILL") == 1
    ledger.tend()
    assert ledger.claim("w") is None and ledger.settled() and len(ledger.trials()) == MAX_LOST


def test_a_trial_that_raised_is_not_retried(url):
    ledger = ledger_of(url, limit=1)
    ledger.tend()
    ledger.fail(ledger.claim("a"), "error", "RuntimeError: no")
    ledger.tend()
    assert ledger.settled() and ledger.claim("a") is None


def test_a_result_that_comes_after_the_trial_was_given_away_does_not_count(url):
    ledger = ledger_of(url, limit=1)
    ledger.tend()
    slow = ledger.claim("slow")
    ledger.fail(slow, "lost", "no sign of life")
    ledger.study.tell(slow.number, 3.0, skip_if_finished=True)
    assert ledger.study.trials[slow.number].state == TrialState.FAIL
    ledger.fail(slow, "error", "too late")  # nor does a failure
    assert ledger.study.trials[slow.number].user_attrs["cause"] == "lost"


def test_a_larger_limit_adds_points_and_a_smaller_one_leaves_some(url):
    ledger_of(url, limit=2).tend()
    ledger = ledger_of(url, limit=4)
    ledger.tend()
    assert points(ledger, TrialState.WAITING) == [0, 1, 2, 3]
    small = ledger_of(url, limit=1)
    finish(small, small.claim("a"))
    assert small.claim("a") is None and small.settled() and not ledger.settled()


def test_without_a_limit_there_is_always_one_more(url):
    ledger = ledger_of(url, limit=None)
    for point in range(3):
        ledger.tend()
        trial = ledger.claim("a")
        assert trial.user_attrs["point"] == point
        finish(ledger, trial)
    assert not ledger.settled()


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, as under `work`: a suite started in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_worker_learns_that_its_trial_was_taken(url, interruptible):
    ledger = ledger_of(url, limit=1, stale=0.6)
    ledger.tend()
    trial = ledger.claim("cut off")
    with pytest.raises(KeyboardInterrupt), alive(ledger, trial, None):
        ledger_of(url, limit=1).fail(trial, "lost", "no sign of life")
        threading.Event().wait(20)
    assert ledger.taken


def test_who_could_not_look_has_seen_nobody_silent(url, monkeypatch):
    """A storage that is away for longer than `stale` is no reason to take the trials of those it was away for as well."""
    ledger = ledger_of(url, limit=1, stale=0.2)
    ledger.tend()
    trial = ledger.claim("living")
    ledger.tend()
    with monkeypatch.context() as away, pytest.raises(StorageInternalError):
        away.setattr(ledger, "trials", lambda: (_ for _ in ()).throw(StorageInternalError))
        ledger.tend()
    threading.Event().wait(0.3)
    ledger.tend()
    assert ledger.study.trials[trial.number].state == TrialState.RUNNING
    threading.Event().wait(0.3)
    ledger.tend()
    assert ledger.study.trials[trial.number].state == TrialState.FAIL
