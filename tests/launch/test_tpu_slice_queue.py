"""launch/tpu_slice.sh: creating and deleting slices, against a fake gcloud."""

from tests.support.fake_gcloud import ABSENT, FAST, QUEUE, SLICE, WHERE, state

CREATE = ["create", *SLICE, "--accelerator", "v5litepod-16", *FAST]


def test_create_requests_and_waits_until_active(cloud):
    cloud.plan(
        describe=[ABSENT, state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE")]
    )
    done = cloud(*CREATE)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["describe", "create", "describe", "describe", "describe"]
    assert "ACTIVE" in done.stderr.splitlines()[-1]


def test_create_again_finds_the_slice(cloud):
    cloud.plan(describe=[state("ACTIVE")])
    assert cloud(*CREATE).returncode == 0
    assert cloud.verbs() == ["describe"]


def test_create_refuses_a_slice_of_another_type(cloud):
    cloud.plan(describe=[state("ACTIVE", "v5litepod-4")])
    done = cloud(*CREATE)
    assert done.returncode == 1
    assert "exists as v5litepod-4, not v5litepod-16: choose another --name" in done.stderr


def test_create_tries_a_failing_request_again(cloud):
    cloud.plan(describe=[ABSENT, state("ACTIVE")], create=[{"status": 1}, {"status": 1}, {}])
    done = cloud(*CREATE)
    assert done.returncode == 0
    assert cloud.verbs() == ["describe", "create", "create", "create", "describe"]
    assert "try 2 of 3" in done.stderr


def test_create_gives_up_after_the_retries(cloud):
    cloud.plan(describe=[ABSENT], create=[{"status": 1, "err": "quota exceeded\n"}] * 9)
    done = cloud(*CREATE, "--retries", "2")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"] + ["create"] * 3
    assert "quota exceeded" in done.stderr


def test_a_lost_spot_slice_is_named_deleted_and_requested_again(cloud):
    cloud.plan(describe=[state("SUSPENDED"), ABSENT, state("ACTIVE")])
    done = cloud(*CREATE, "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["describe", "delete", "describe", "create", "describe"]
    assert (
        "deleting the SUSPENDED request of TPU slice slice-1 in us-west4-a of project my-project"
        in done.stderr
    )


def test_a_request_that_keeps_failing_ends_with_advice(cloud):
    cloud.plan(describe=[state("FAILED")] * 9)
    done = cloud(*CREATE, "--retries", "1")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe", "delete", "describe"]
    assert "another --zone, --accelerator or no --spot" in done.stderr


def test_a_failing_look_at_the_queue_is_no_missing_slice(cloud):
    cloud.plan(describe=[{"status": 1, "err": "ERROR: PERMISSION_DENIED"}] * 9)
    done = cloud(*CREATE, "--retries", "1")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"] * 2  # and never a create
    assert "PERMISSION_DENIED" in done.stderr


def test_create_does_not_wait_when_told(cloud):
    cloud.plan(describe=[ABSENT, state("WAITING_FOR_RESOURCES")])
    assert cloud(*CREATE, "--wait", "0").returncode == 0
    assert cloud.verbs() == ["describe", "create", "describe"]


def test_delete_names_the_slice_and_asks(cloud):
    done = cloud("delete", *SLICE)
    assert done.returncode == 1
    assert cloud.calls() == []
    named, asked = done.stderr.splitlines()
    assert "TPU slice slice-1 in us-west4-a of project my-project" in named
    assert "add --yes" in asked


def test_delete_with_yes(cloud):
    cloud.plan(describe=[state("ACTIVE")])
    done = cloud("delete", *SLICE, "--yes")
    assert done.returncode == 0
    assert cloud.calls()[-1] == [*QUEUE, "delete", "slice-1", *WHERE, "--force", "--quiet"]
    assert "this deletes the TPU slice slice-1" in done.stderr


def test_delete_of_nothing_says_so(cloud):
    cloud.plan(describe=[ABSENT])
    done = cloud("delete", *SLICE, "--yes")
    assert done.returncode == 1
    assert cloud.verbs() == ["describe"]
    assert "does not exist: check --name" in done.stderr
