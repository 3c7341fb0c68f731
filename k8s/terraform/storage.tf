locals {
  # Names of buckets are the world's: the account makes ours our own.
  buckets = {
    exports = "${var.name}-exports-${data.aws_caller_identity.current.account_id}-${var.region}"
    models  = "${var.name}-models-${data.aws_caller_identity.current.account_id}-${var.region}"
    access  = "${var.name}-access-${data.aws_caller_identity.current.account_id}-${var.region}"
  }
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV2_AWS_62:Nobody waits for an event of these buckets.
  #checkov:skip=CKV_AWS_18:The bucket of access logs logs no access to itself; the others do, below.
  #checkov:skip=CKV_AWS_144:Where there is a peer region, exports are replicated to it, below.
  for_each            = local.buckets
  bucket              = each.value
  object_lock_enabled = each.key == "exports"
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each                = aws_s3_bucket.this
  bucket                  = each.value.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  rule {
    bucket_key_enabled = true
    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.this.arn
    }
  }
}

resource "aws_s3_bucket_logging" "this" {
  for_each      = { for name, bucket in aws_s3_bucket.this : name => bucket if name != "access" }
  bucket        = each.value.id
  target_bucket = aws_s3_bucket.this["access"].id
  target_prefix = "${each.key}/"
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  for_each = aws_s3_bucket.this
  bucket   = each.value.id
  rule {
    id     = "tidy"
    status = "Enabled"
    filter {}
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
    noncurrent_version_expiration {
      noncurrent_days = 90
    }
  }
}

# Evidence: not even an administrator shortens this.
resource "aws_s3_bucket_object_lock_configuration" "exports" {
  bucket = aws_s3_bucket.this["exports"].id
  rule {
    default_retention {
      mode = "COMPLIANCE"
      days = var.export_retention_days
    }
  }
}

resource "aws_s3_bucket_replication_configuration" "exports" {
  count  = var.peer_region == null ? 0 : 1
  bucket = aws_s3_bucket.this["exports"].id
  role   = aws_iam_role.replication[0].arn
  rule {
    id     = "to-peer"
    status = "Enabled"
    filter {}
    delete_marker_replication {
      status = "Disabled"
    }
    source_selection_criteria {
      sse_kms_encrypted_objects {
        status = "Enabled"
      }
    }
    destination {
      bucket = local.peer_exports
      encryption_configuration {
        replica_kms_key_id = "arn:${data.aws_partition.current.partition}:kms:${var.peer_region}:${data.aws_caller_identity.current.account_id}:alias/${var.name}"
      }
    }
  }
  depends_on = [aws_s3_bucket_versioning.this]
}

# --- Images

resource "aws_ecr_repository" "this" {
  for_each             = toset(["server", "worker", "torchserve"])
  name                 = "pretrade-${each.key}"
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
  encryption_configuration {
    encryption_type = "KMS"
    kms_key         = aws_kms_key.this.arn
  }
}
