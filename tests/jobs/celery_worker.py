"""What the worker processes of test_celery.py import."""

import os

from tests.jobs.celery_tasks import build

app = build(os.environ).app
