from django.db import migrations

import firefly_jobs.databases.fields


class Migration(migrations.Migration):
    dependencies = [
        ("firefly_jobs", "0006_events"),
    ]

    operations = [
        migrations.AlterField(
            model_name="workflowstep",
            name="name",
            field=firefly_jobs.databases.fields.ExactCharField(max_length=200, verbose_name="name"),
        ),
    ]
