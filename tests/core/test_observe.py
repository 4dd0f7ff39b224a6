"""Who observes sees the stages of their own context, and nobody else's."""

import threading

from fullrank.core import Run, observe_stages
from fullrank.core.observe import stage_finished


def test_stages_are_seen_inside_only():
    run = Run.from_dict({"q": {"a": 1.0}})
    stage_finished("before", run)
    with observe_stages() as outer:
        stage_finished("first", run)
        with observe_stages() as inner:
            stage_finished("second", run)
        stage_finished("third", run)
    stage_finished("after", run)
    assert [name for name, _ in outer] == ["first", "third"]
    assert [name for name, _ in inner] == ["second"]


def test_threads_do_not_see_each_other():
    run = Run({})
    with observe_stages() as seen:
        thread = threading.Thread(target=stage_finished, args=("elsewhere", run))
        thread.start()
        thread.join()
    assert seen == []
