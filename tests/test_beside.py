"""What stands beside a student: the teacher as shadow and as help, a candidate and the way back, and what is recorded of it."""

import asyncio
import json
import random
import re
from contextlib import asynccontextmanager

import pytest
import sqlalchemy

from slimlmm.errors import UserError
from slimlmm.serving.asks import Said, Token
from slimlmm.serving.canary import Canary, CanarySettings
from slimlmm.serving.chat import Chat, completion
from slimlmm.serving.escalation import KINDS, Escalation, area, curve, fitted, read
from slimlmm.serving.gateway import Gateway
from slimlmm.serving.limits import Limits
from slimlmm.serving.metering import Meter
from slimlmm.serving.shadow import Shadow, Shadowing
from slimlmm.serving.store import ANSWERS, ENERGY, EVENTS, PAIRS, PICTURES, Store, opened
from slimlmm.serving.streams import Heard
from test_gateway import Fake, arm_of, asked, calling, run

PATH = "/v1/chat/completions"


def saying(text, logprob=-0.1, *, forgets=False):
    """Return what an engine does that always answers this, each token as likely; one that forgets gives no log-probabilities."""

    async def does(raw):
        chat = Chat.model_validate(raw)
        tokens = tuple(Token(text=word, logprob=logprob) for word in text.split())
        answer = completion(Said(text=text, tokens=tokens, finish="stop", prompt_tokens=7), chat, "engine")
        if forgets:
            answer["choices"][0]["logprobs"] = None
        return answer

    return does


def threshold(value=-0.5, kind="least"):
    return Escalation(
        kind=kind, threshold=value, rows=10, share=0.1, accuracy=0.9, student_accuracy=0.8, teacher_accuracy=0.9
    )


@asynccontextmanager
async def beside(
    tmp_path, student, teacher, *, candidate=None, share=None, waiting=64, canary=None, streams=False, **more
):
    """Yield a gateway with a teacher, where wanted as shadow of a share, and a client of it."""
    limits = more.pop("limits", {})
    store = Store(str(tmp_path / "store.sqlite"))
    async with (
        arm_of(student, streams=streams, **limits) as first,
        arm_of(teacher, name="teacher", **limits) as second,
        arm_of(candidate or Fake(), name="candidate", **limits) as third,
    ):
        gateway = Gateway(name="s", student=first, teacher=second, limits=Limits(**limits), store=store, **more)
        if candidate is not None:
            gateway.candidate = third
            gateway.canary = Canary(CanarySettings(**(canary or {})), rng=random.Random(0))
        if share is not None:
            gateway.shadow = Shadow(
                settings=Shadowing(share=share, waiting=waiting),
                teacher=second,
                store=store,
                metrics=gateway.metrics,
                deadline_s=limits.get("deadline_s", 5.0),
                pixels=10_000,
                compared=gateway.compared,
                rng=random.Random(0),
            )
        async with calling(gateway, admin_token="admin") as client:
            yield gateway, client
    store.close()


def rows(tmp_path, table):
    database = opened(str(tmp_path / "store.sqlite"))
    with database.connect() as connection:
        found = [dict(row) for row in connection.execute(sqlalchemy.select(table)).mappings()]
    database.dispose()
    return found


@pytest.mark.parametrize("streamed", [False, True])
def test_an_unsure_answer_is_the_teachers_and_both_are_recorded(tmp_path, streamed):
    student, teacher = Fake(saying("soda pop", -0.7)), Fake(saying("cola"))

    async def work():
        async with beside(tmp_path, student, teacher, escalation=threshold(), streams=True) as (_, client):
            header = {"x-slimlmm-task": "drinks"}
            answer = await client.post(PATH, json=asked(stream=streamed), headers=header)
            assert "cola" in answer.text
            assert "soda" not in answer.text
            if not streamed:
                assert answer.json()["choices"][0]["logprobs"] is None
            metrics = (await client.get("/metrics")).text
            assert 'slimlmm_escalations_total{outcome="taken"} 1.0' in metrics
            assert 'slimlmm_answers_total{arm="student",route="teacher"} 1.0' in metrics
            return answer.headers["x-slimlmm-id"]

    name = run(work())
    (answer,), (pair,) = rows(tmp_path, ANSWERS), rows(tmp_path, PAIRS)
    assert (answer["id"], answer["route"], answer["answer"], answer["task"]) == (name, "teacher", "cola", "drinks")
    assert answer["confidence"] == -0.7
    assert answer["question"] == "What is it?"
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (7, 1)
    assert (pair["answer_id"], pair["purpose"], pair["student"], pair["teacher"]) == (
        name,
        "escalation",
        "soda pop",
        "cola",
    )
    assert pair["agree"] is False
    assert student.seen[0]["logprobs"] is True
    assert "logprobs" not in teacher.seen[0]


def test_a_sure_answer_stays_and_log_probabilities_are_given_to_those_who_asked(tmp_path):
    student, teacher = Fake(saying("soda pop", -0.3)), Fake(saying("cola"))

    async def work():
        async with beside(tmp_path, student, teacher, escalation=threshold()) as (_, client):
            plain = (await client.post(PATH, json=asked())).json()["choices"][0]
            told = (await client.post(PATH, json=asked(logprobs=True))).json()["choices"][0]
            assert plain["message"]["content"] == told["message"]["content"] == "soda pop"
            assert plain["logprobs"] is None
            assert [one["logprob"] for one in told["logprobs"]["content"]] == [-0.3, -0.3]

    run(work())
    assert teacher.seen == []
    assert rows(tmp_path, PAIRS) == []


def test_where_the_teacher_cannot_the_students_answer_stays(tmp_path):
    async def broken(_raw):
        raise RuntimeError("no")

    slow = Fake(saying("cola"))
    slow.held.clear()

    async def work():
        for teacher, outcome in ((Fake(broken), "failed"), (slow, "late")):
            student, limits = Fake(saying("soda pop", -0.7)), {"teacher_s": 0.5}
            async with beside(tmp_path, student, teacher, escalation=threshold(), limits=limits) as (_, client):
                answer = await client.post(PATH, json=asked())
                assert answer.json()["choices"][0]["message"]["content"] == "soda pop"
                assert f'slimlmm_escalations_total{{outcome="{outcome}"}} 1.0' in (await client.get("/metrics")).text
                slow.held.set() if teacher is slow else None

    run(work())


def test_an_engine_that_forgets_its_log_probabilities_counts_as_unsure(tmp_path):
    async def work():
        student = Fake(saying("soda pop", forgets=True))
        async with beside(tmp_path, student, Fake(saying("cola")), escalation=threshold()) as (_, client):
            assert (await client.post(PATH, json=asked())).json()["choices"][0]["message"]["content"] == "cola"

    run(work())


def test_the_shadow_compares_off_the_users_path_with_features_of_the_picture(tmp_path):
    student, teacher = Fake(saying("soda pop")), Fake(saying("soda  pop "))
    teacher.held.clear()

    async def work():
        async with beside(tmp_path, student, teacher, share=1.0) as (gateway, client):
            answer = await client.post(PATH, json=asked())
            assert answer.status_code == 200
            while not teacher.seen:
                await asyncio.sleep(0.01)
            teacher.held.set()
            await gateway.shadow.idle()
            assert 'slimlmm_shadows_total{arm="student",outcome="agreed"} 1.0' in (await client.get("/metrics")).text

    run(work())
    (pair,), (picture,) = rows(tmp_path, PAIRS), rows(tmp_path, PICTURES)
    assert (pair["purpose"], pair["agree"]) == ("shadow", True)
    assert pair["teacher_seconds"] > 0
    assert (picture["width"], picture["height"], picture["brightness"], picture["file"]) == (8, 8, 0.0, None)
    assert picture["answer_id"] == pair["answer_id"]


def test_a_full_shadow_queue_drops_and_nobody_waits(tmp_path):
    student, teacher = Fake(saying("soda")), Fake(saying("cola"))
    teacher.held.clear()

    async def work():
        async with beside(tmp_path, student, teacher, share=1.0, waiting=2) as (gateway, client):
            await client.post(PATH, json=asked())
            while not teacher.seen:
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(client.post(PATH, json=asked()) for _ in range(8)))
            assert {one.status_code for one in answers} == {200}
            assert 'slimlmm_shadows_total{arm="student",outcome="dropped"} 6.0' in (await client.get("/metrics")).text
            assert gateway.shadow.waiting == 2

    run(work())


def test_half_of_it_goes_to_the_candidate_and_a_share_of_zero_asks_no_teacher(tmp_path):
    student, candidate, teacher = Fake(saying("old")), Fake(saying("new")), Fake(saying("cola"))

    async def work():
        async with beside(tmp_path, student, teacher, candidate=candidate, canary={"weight": 0.5}, share=0.0) as (
            _,
            client,
        ):
            await asyncio.gather(*(client.post(PATH, json=asked()) for _ in range(60)))
            wrong = await client.get("/admin/canary", headers={"authorization": "Bearer wrong"})
            assert wrong.status_code == 401
            header = {"authorization": "Bearer admin"}
            assert (await client.get("/admin/canary", headers=header)).json()["weight"] == 0.5
            assert (await client.put("/admin/canary", json={"weight": 1.5}, headers=header)).status_code == 422
            student.held.clear()
            done = True
            while done:  # until one of them is the student's
                waiting = asyncio.create_task(client.post(PATH, json=asked()))
                done, _ = await asyncio.wait([waiting], timeout=0.1)
            put = await client.put("/admin/canary", json={"weight": 1.0}, headers=header)
            assert put.json()["weight"] == 1.0
            student.held.set()
            assert (await waiting).json()["choices"][0]["message"]["content"] == "old", (
                "what was begun ends where it began"
            )
            answer = await client.post(PATH, json=asked())
            assert answer.json()["choices"][0]["message"]["content"] == "new"

    run(work())
    assert 15 <= len(candidate.seen) <= 60
    assert teacher.seen == []
    assert {row["arm"] for row in rows(tmp_path, ANSWERS)} == {"student", "candidate"}
    (event,) = rows(tmp_path, EVENTS)
    assert (event["kind"], event["detail"]["weight"]) == ("canary", 1.0)


def test_a_candidate_that_disagrees_is_taken_back_and_the_reason_recorded(tmp_path):
    student, candidate, teacher = Fake(saying("cola")), Fake(saying("soda")), Fake(saying("cola"))

    async def work():
        async with beside(tmp_path, student, teacher, candidate=candidate, canary={"weight": 0.5}, share=1.0) as (
            gateway,
            client,
        ):
            for _ in range(80):
                assert (await client.post(PATH, json=asked())).status_code == 200
                await gateway.shadow.idle()
                if gateway.canary.weight == 0:
                    break
            assert gateway.canary.weight == 0
            before = len(candidate.seen)
            for _ in range(20):
                await client.post(PATH, json=asked())
            assert len(candidate.seen) == before
            assert 'slimlmm_canary_returns_total{rule="agreement"} 1.0' in (await client.get("/metrics")).text

    run(work())
    (event,) = rows(tmp_path, EVENTS)
    assert (event["kind"], event["detail"]["rule"]) == ("returned", "agreement")
    assert event["detail"]["rules"]["agreement"]["p"] <= 0.05 / 3
    store = Store(str(tmp_path / "store.sqlite"))
    assert store.last_weight("candidate-folder") == 0, "a restart does not bring it back"
    store.close()


def test_a_failing_candidate_is_taken_back(tmp_path):
    async def broken(_raw):
        raise RuntimeError("no")

    async def work():
        async with beside(
            tmp_path, Fake(saying("a")), Fake(), candidate=Fake(broken), canary={"weight": 1.0, "errors": 0.05}
        ) as (gateway, client):
            statuses = [(await client.post(PATH, json=asked())).status_code for _ in range(60)]
            assert gateway.canary.weight == 0
            assert statuses[-1] == 200
            assert statuses.count(500) < 40

    run(work())


class Steps:
    """A counter that rises by 3 J at each look."""

    name, basis = "steps", "measured"

    def __init__(self):
        self.total = 0.0

    def joules(self):
        self.total += 3.0
        return self.total


def test_energy_is_recorded_with_the_requests_answered_meanwhile(tmp_path):
    async def work():
        async with beside(tmp_path, Fake(saying("cola")), Fake()) as (gateway, client):
            gateway.meter = Meter(counter=Steps(), seconds=0.4, metrics=gateway.metrics, store=gateway.store)
            reading = asyncio.create_task(gateway.meter.run())
            await asyncio.sleep(0)
            await asyncio.gather(*(client.post(PATH, json=asked()) for _ in range(3)))
            await asyncio.sleep(1.0)
            reading.cancel()
            joules = re.search(r"^slimlmm_energy_joules_total (\S+)", (await client.get("/metrics")).text, re.MULTILINE)
            return float(joules[1])

    joules = run(work())
    found = rows(tmp_path, ENERGY)
    assert len(found) >= 2
    assert sum(row["joules"] for row in found) == joules == 3.0 * len(found)
    assert sum(row["requests"] for row in found) == 3
    assert all(row["source"] == "steps" and row["seconds"] >= 0.4 for row in found)


def drive(canary, agreement, seconds=(0.1, 0.1), failed=0.0, n=2000, seed=0):
    """Give a canary n answers of each arm; returns the rule that took it back, and after how many."""
    rng = random.Random(seed)
    for turn in range(n):
        for arm, share, taken in zip(("student", "candidate"), agreement, seconds, strict=True):
            bad = arm == "candidate" and rng.random() < failed
            rule = canary.answered(arm, taken * rng.uniform(0.9, 1.1), failed=bad)
            rule = rule or canary.compared(arm, agreed=rng.random() < share)
            if rule:
                return rule, turn
    return None, n


def test_rules_hold_a_bad_candidate_back_and_let_a_good_one_be():
    rules = CanarySettings(weight=0.5)
    taken = [drive(Canary(rules), (0.95, 0.94), seed=seed)[0] for seed in range(30)]
    assert taken.count(None) >= 27
    for asked_for, more in (
        ("agreement", {"agreement": (0.95, 0.80)}),
        ("latency", {"agreement": (1, 1), "seconds": (0.1, 0.2)}),
        ("errors", {"agreement": (1, 1), "failed": 0.1}),
    ):
        found = [drive(Canary(rules), **more, seed=seed) for seed in range(5)]
        assert {rule for rule, _ in found} == {asked_for}
        assert max(after for _, after in found) < 1000


def brute(confidences, student, teacher, threshold):
    right = [t if c < threshold else s for c, s, t in zip(confidences, student, teacher, strict=True)]
    return sum(right) / len(right)


def test_the_curve_is_what_each_threshold_does():
    rng = random.Random(3)
    confidences = [round(rng.uniform(-2, 0), 1) for _ in range(60)]
    student = [rng.random() < 0.5 + value / 4 for value in confidences]
    teacher = [rng.random() < 0.9 for _ in confidences]
    points = curve(confidences, student, teacher)
    assert points[0].share == 0
    assert points[-1].share == 1
    assert len(points) == len(set(confidences)) + 1
    for point in points:
        assert point.accuracy == pytest.approx(brute(confidences, student, teacher, point.threshold))
        assert point.share == pytest.approx(sum(one < point.threshold for one in confidences) / 60)
    best = fitted(points, share=0.3)
    assert best.share <= 0.3
    assert best.accuracy == max(point.accuracy for point in points if point.share <= 0.3)
    least = fitted(points, accuracy=0.7)
    assert least.share == min(point.share for point in points if point.accuracy >= 0.7)
    assert min(point.accuracy for point in points) <= area(points) <= max(point.accuracy for point in points)
    with pytest.raises(UserError, match="no threshold keeps"):
        fitted(points, accuracy=1.01)


def test_confidences_of_an_answer():
    logprobs = [-0.1, -0.7, -0.4]
    found = {kind: value(logprobs) for kind, value in KINDS.items()}
    assert found == {"least": -0.7, "mean": pytest.approx(-0.4), "sum": pytest.approx(-1.2), "first": -0.1}
    assert threshold().confidence(None) is None
    assert threshold().unsure(None)
    assert threshold().confidence([]) == 0.0


def test_a_file_that_is_no_threshold_is_refused(tmp_path):
    path = tmp_path / "escalation.json"
    with pytest.raises(UserError, match="No such file"):
        read(path)
    path.write_text(json.dumps({"kind": "most"}))
    with pytest.raises(UserError, match="kind: Input should be"):
        read(path)
    path.write_text(threshold().model_dump_json())
    assert read(path) == threshold()


def test_a_stream_is_heard_wherever_it_is_cut():
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
        {"choices": [{"index": 0, "delta": {"content": "so"}}, {"index": 1, "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": {"content": "dä"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    ]
    sent = "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in events) + "data: [DONE]\n\n"
    for size in (1, 7, 1000):
        heard = Heard()
        whole = sent.encode()
        [heard.feed(whole[at : at + size]) for at in range(0, len(whole), size)]
        assert (heard.text, heard.prompt_tokens, heard.completion_tokens) == ("sodä", 3, 2)
