# What has no default, and what production has otherwise; another file for another environment.
region             = "eu-central-1"
zones              = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
kubernetes_version = "1.33"
operators          = []
