"""What the worker processes of test_celery.py import."""

import os

from sqlalchemy import text

from tests.jobs.celery_tasks import build

jobs = build(os.environ)
# Both engines have connections before a pool of processes is forked, as a careless module has.
jobs.database.ping()
with jobs.database.begin() as session:
    session.execute(text("SELECT 1"))

app = jobs.app
