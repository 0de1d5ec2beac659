"""Settings of the test project, and of the tests.

The environment chooses the database (``FIREFLY_DATABASE``, a URL).  With
``FIREFLY_TESTING=1`` the tests' own app and a second alias ``other`` are there,
sessions speak a zone other than UTC, and ``FIREFLY_JOBS_SETTINGS`` (JSON) is
merged into ``FIREFLY_JOBS``, so that a consumer started by a test can have a
short lease.
"""

import json
import os
from pathlib import Path
from typing import Any

import django

from testproject.databases import database_from_url

BASE_DIR = Path(__file__).resolve().parent.parent
TESTING = os.environ.get("FIREFLY_TESTING") == "1"

# A demo on loopback; nothing is protected by it.
SECRET_KEY = "not-secret-this-is-the-test-project"  # noqa: S105
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "testserver"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "firefly_jobs",
    "testproject.codeindex",
    "testproject.datafiles",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "testproject.urls"

TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASE_URL = os.environ.get("FIREFLY_DATABASE") or f"sqlite:///{BASE_DIR / 'db.sqlite3'}"
DATABASES: dict[str, dict[str, Any]] = {"default": database_from_url(DATABASE_URL)}

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

USE_TZ = True
TIME_ZONE = "Europe/Oslo"
LANGUAGE_CODE = "en-us"
STATIC_URL = "static/"
LOGIN_URL = "admin:login"

if django.VERSION >= (6, 1):
    # Django's own default, which it wants to be told from then on.
    MAILERS = {"default": {"BACKEND": "django.core.mail.backends.smtp.EmailBackend"}}

FIREFLY_JOBS: dict[str, Any] = {}

if TESTING:
    INSTALLED_APPS.append("tests.testapp")
    DATABASES["other"] = database_from_url(DATABASE_URL, suffix="_other")
    for database in DATABASES.values():
        # Django sets the zone of a PostgreSQL session to UTC by itself, but leaves this one alone.
        if database["ENGINE"].endswith(".mysql"):
            database["OPTIONS"]["init_command"] = "SET time_zone = '-05:00'"
    # Hashing well costs a test a tenth of a second per user.
    PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    FIREFLY_JOBS |= json.loads(os.environ.get("FIREFLY_JOBS_SETTINGS", "{}"))
