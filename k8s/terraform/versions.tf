terraform {
  required_version = ">= 1.6"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.80"
    }
    random = {
      source  = "hashicorp/random"
      version = "~> 3.6"
    }
  }
  # The bucket and the lock are the organisation's: terraform init -backend-config=...
  backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags {
    tags = {
      project = var.name
      managed = "terraform"
    }
  }
}
