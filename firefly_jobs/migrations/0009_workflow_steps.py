from django.db import migrations, models

import firefly_jobs.databases.fields


class Migration(migrations.Migration):
    dependencies = [
        ("firefly_jobs", "0008_registered_jobs"),
    ]

    operations = [
        migrations.AlterField(
            model_name="workflowstep",
            name="name",
            field=firefly_jobs.databases.fields.ExactCharField(max_length=200, verbose_name="name"),
        ),
        migrations.AddField(
            model_name="workflowstep",
            name="is_forgiven",
            field=models.BooleanField(blank=True, null=True, verbose_name="failure is forgiven"),
        ),
    ]
