"""What a worker says to an agent that is busy, stopped, or gone."""

import threading
import time

from jaxscale.supervisor import mailbox
from jaxscale.supervisor.mailbox import Letters, Mailbox


def test_a_burst_is_heard_by_an_agent_that_is_busy_for_a_moment(tmp_path):
    letters, words, heard = Letters(tmp_path), Mailbox(tmp_path, 3), []

    def read():
        deadline = time.monotonic() + 20
        while len(heard) < 60 and time.monotonic() < deadline:
            time.sleep(0.05)
            heard.extend(fields["number"] for _, fields in letters.read())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        words.say("rejected", {"number": number})
    reader.join()
    assert heard == list(range(60))
    letters.close()


def test_an_agent_that_is_stopped_costs_one_wait_and_is_heard_of_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mailbox, "FULL_SECONDS", 0.2)
    letters, words = Letters(tmp_path), Mailbox(tmp_path, 3)
    began = time.monotonic()
    for number in range(200):
        words.say("slot_sealed", {"file": "gen-0", "step": number})
    assert time.monotonic() - began < 5, "one wait, and not one for each word"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert 0 < len(list(letters.read())) < 200
    words.say("finished", {"reason": "COMPLETED"})
    assert [kind for kind, _ in letters.read()] == ["finished"]
    letters.close()


def test_without_an_agent_nothing_waits(tmp_path):
    began = time.monotonic()
    Mailbox(tmp_path, 3).say("begun", {})
    assert time.monotonic() - began < mailbox.FULL_SECONDS
