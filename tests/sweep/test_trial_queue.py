"""The trial queue: every point runs exactly once, on every storage."""

import threading

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from tq_lightning.sweep.heartbeat import heartbeat
from tq_lightning.sweep.storage import open_storage
from tq_lightning.sweep.trial_queue import MAX_LOST, TrialQueue

URLS = {"sqlite": "sqlite:///{}/study.db", "journal": "journal:{}/study.journal"}


@pytest.fixture(params=URLS)
def url(request, tmp_path):
    return URLS[request.param].format(tmp_path)


def queue_of(url, limit=5, stale=60.0):
    study = optuna.create_study(storage=open_storage(url), study_name="s", load_if_exists=True)
    return TrialQueue(study, lambda point: {"x": point}, limit, stale)


def finish(queue, trial):
    queue.study.tell(trial.number, 1.0)


def points(queue, *states):
    return [t.user_attrs["point"] for t in queue.trials() if t.state in states]


def test_every_point_is_queued_and_claimed_once(url):
    queue, other = queue_of(url), queue_of(url)
    queue.refresh()
    other.refresh()
    assert points(queue, TrialState.WAITING) == [0, 1, 2, 3, 4]
    claimed = []
    while trial := (queue if len(claimed) % 2 else other).claim("me"):
        claimed.append(trial.user_attrs["point"])
        assert trial.system_attrs["fixed_params"] == {"x": claimed[-1]}
    assert claimed == [0, 1, 2, 3, 4] and not queue.finished()


def test_concurrent_claims_never_share_a_trial(url):
    queues = [queue_of(url, limit=16) for _ in range(3)]
    queues[0].refresh()
    claimed: list[int] = []

    def run(queue):
        while trial := queue.claim("me"):
            claimed.append(trial.user_attrs["point"])
            finish(queue, trial)

    threads = [threading.Thread(target=run, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(16)) and queues[0].finished()


def test_point_enqueued_twice_runs_once(url):
    queue = queue_of(url, limit=1)
    for _ in range(2):  # like two commands that start at the same time
        queue.study.enqueue_trial({"x": 0}, user_attrs={"point": 0, "attempt": 0})
    finish(queue, queue.claim("a"))
    assert queue.claim("b") is None and queue.finished()
    assert [t.state for t in queue.trials()] == [TrialState.COMPLETE]


def test_heartbeat_satisfies_commands_with_a_shorter_timeout(url, monkeypatch):
    monkeypatch.setattr("tq_lightning.sweep.heartbeat.STALE_SECONDS", 0.6)
    queue, observer = queue_of(url, limit=1, stale=3600), queue_of(url, limit=1, stale=0.6)
    queue.refresh()
    trial = queue.claim("a")
    with heartbeat(queue, trial, None):
        for _ in range(20):
            threading.Event().wait(0.1)
            observer.refresh()
    assert queue.study.trials[trial.number].state == TrialState.RUNNING


def test_worker_without_heartbeat_loses_its_trial(url):
    queue = queue_of(url, limit=2, stale=0.6)
    queue.refresh()
    dead, living = queue.claim("dead"), queue.claim("living")
    with heartbeat(queue, living, None):
        for _ in range(20):
            threading.Event().wait(0.1)
            queue.refresh()
    retry = queue.claim("next")
    assert (
        retry.user_attrs["point"],
        retry.user_attrs["attempt"],
        retry.user_attrs["retry_of"],
    ) == (0, 1, dead.number)
    assert "heartbeat timed out" in queue.study.trials[dead.number].user_attrs["reason"]
    assert (
        queue.study.trials[living.number].state == TrialState.RUNNING
        and queue.claim("next") is None
    )
    finish(queue, living), finish(queue, retry)
    assert queue.finished()


def test_trial_is_requeued_if_the_process_that_failed_it_dies(url):
    queue = queue_of(url, limit=1)
    queue.refresh()
    queue.fail(queue.claim("a"), "interrupted", "stopped")  # and no refresh() after it
    other = queue_of(url, limit=1)
    assert not other.finished()
    other.refresh()
    assert other.claim("b").user_attrs["attempt"] == 1


def test_point_that_kills_its_workers_is_abandoned(url):
    queue = queue_of(url, limit=1)
    for _ in range(MAX_LOST):
        queue.refresh()
        queue.claim("w")
        assert (
            not queue.finished()
            and queue.fail_worker("w", "lost", "its worker was killed by SIGKILL") == 1
        )
    queue.refresh()
    assert queue.claim("w") is None and queue.finished() and len(queue.trials()) == MAX_LOST


def test_trial_that_raised_is_not_retried(url):
    queue = queue_of(url, limit=1)
    queue.refresh()
    queue.fail(queue.claim("a"), "error", "RuntimeError: no")
    queue.refresh()
    assert queue.finished() and queue.claim("a") is None


def test_late_result_of_a_failed_trial_is_ignored(url):
    queue = queue_of(url, limit=1)
    queue.refresh()
    slow = queue.claim("slow")
    queue.fail(slow, "lost", "heartbeat timed out")
    queue.study.tell(slow.number, 3.0, skip_if_finished=True)
    assert queue.study.trials[slow.number].state == TrialState.FAIL
    queue.fail(slow, "error", "too late")  # nor does a failure
    assert queue.study.trials[slow.number].user_attrs["cause"] == "lost"


def test_changed_limit_adds_or_skips_points(url):
    queue_of(url, limit=2).refresh()
    queue = queue_of(url, limit=4)
    queue.refresh()
    assert points(queue, TrialState.WAITING) == [0, 1, 2, 3]
    small = queue_of(url, limit=1)
    finish(small, small.claim("a"))
    assert small.claim("a") is None and small.finished() and not queue.finished()


def test_without_a_limit_one_more_trial_is_always_waiting(url):
    queue = queue_of(url, limit=None)
    for point in range(3):
        queue.refresh()
        trial = queue.claim("a")
        assert trial.user_attrs["point"] == point
        finish(queue, trial)
    assert not queue.finished()


def test_worker_detects_that_its_trial_was_reassigned(url, interruptible):
    queue = queue_of(url, limit=1, stale=0.6)
    queue.refresh()
    trial = queue.claim("cut off")
    with pytest.raises(KeyboardInterrupt), heartbeat(queue, trial, None):
        queue_of(url, limit=1).fail(trial, "lost", "heartbeat timed out")
        threading.Event().wait(20)
    assert queue.trial_taken


def test_outage_does_not_fail_running_trials(url, monkeypatch):
    """An outage longer than the heartbeat timeout fails no trial: it affected workers too."""
    queue = queue_of(url, limit=1, stale=0.2)
    queue.refresh()
    trial = queue.claim("living")
    queue.refresh()
    with monkeypatch.context() as patch, pytest.raises(StorageInternalError):
        patch.setattr(queue, "trials", lambda: (_ for _ in ()).throw(StorageInternalError))
        queue.refresh()
    threading.Event().wait(0.3)
    queue.refresh()
    assert queue.study.trials[trial.number].state == TrialState.RUNNING
    threading.Event().wait(0.3)
    queue.refresh()
    assert queue.study.trials[trial.number].state == TrialState.FAIL
