from django.db import migrations

import firefly_jobs.databases.indexes


class Migration(migrations.Migration):
    dependencies = [
        ("firefly_jobs", "0012_schedule_owners"),
    ]

    operations = [
        # First, as on MariaDB the key to the workflow may need one of them.
        migrations.AddIndex(
            model_name="taskmodel",
            index=firefly_jobs.databases.indexes.SetIndex(
                fields=["workflow", "id"], name="firefly_by_workflow"
            ),
        ),
        migrations.RemoveIndex(model_name="taskmodel", name="firefly_workflow"),
    ]
