# --- Kafka: market.events, its dead letters, decisions

resource "aws_msk_configuration" "this" {
  name           = var.name
  kafka_versions = [var.kafka.version]
  # An event that a broker has lost would be a gap in every book: two copies before it is acknowledged, never an unclean leader.
  server_properties = <<-EOT
    auto.create.topics.enable=false
    default.replication.factor=3
    min.insync.replicas=2
    unclean.leader.election.enable=false
    log.retention.hours=24
  EOT
}

resource "aws_msk_cluster" "this" {
  cluster_name           = var.name
  kafka_version          = var.kafka.version
  number_of_broker_nodes = var.kafka.brokers
  enhanced_monitoring    = "PER_TOPIC_PER_PARTITION"

  broker_node_group_info {
    instance_type   = var.kafka.instance_type
    client_subnets  = aws_subnet.private[*].id
    security_groups = [aws_security_group.store["kafka"].id]
    storage_info {
      ebs_storage_info {
        volume_size = var.kafka.gibibytes
      }
    }
  }
  configuration_info {
    arn      = aws_msk_configuration.this.arn
    revision = aws_msk_configuration.this.latest_revision
  }
  # TLS and no credentials: the security group admits the cluster's nodes and nobody else, and the cluster's network
  # policies the pods that must. Clients: PRETRADE_KAFKA_TLS=true; with names and passwords, see docs/security.md.
  client_authentication {
    unauthenticated = true
  }
  encryption_info {
    encryption_at_rest_kms_key_arn = aws_kms_key.this.arn
    encryption_in_transit {
      client_broker = "TLS"
      in_cluster    = true
    }
  }
  logging_info {
    broker_logs {
      cloudwatch_logs {
        enabled   = true
        log_group = aws_cloudwatch_log_group.kafka.name
      }
    }
  }
}

resource "aws_cloudwatch_log_group" "kafka" {
  name              = "/${var.name}/kafka"
  retention_in_days = 400
  kms_key_id        = aws_kms_key.this.arn
}

# --- Redis: feature vectors, which are rebuilt from the topic in seconds; nothing here is a backup

resource "aws_elasticache_subnet_group" "this" {
  name       = var.name
  subnet_ids = aws_subnet.private[*].id
}

resource "aws_elasticache_replication_group" "this" {
  replication_group_id       = var.name
  description                = "Feature vectors"
  engine                     = "valkey"
  engine_version             = "8.0"
  node_type                  = var.redis.node_type
  num_cache_clusters         = var.redis.nodes
  port                       = 6379
  subnet_group_name          = aws_elasticache_subnet_group.this.name
  security_group_ids         = [aws_security_group.store["redis"].id]
  automatic_failover_enabled = true
  multi_az_enabled           = true
  at_rest_encryption_enabled = true
  kms_key_id                 = aws_kms_key.this.arn
  transit_encryption_enabled = true
  user_group_ids             = [aws_elasticache_user_group.this.user_group_id]
  apply_immediately          = false
}

resource "aws_elasticache_user" "pretrade" {
  user_id   = var.name
  user_name = "default"
  engine    = "valkey"
  # Feature vectors, reports, and the control state of the servers.
  access_string = "on ~features* ~pretrade:* &features* &pretrade:* +@all -@dangerous -@admin"
  authentication_mode {
    type      = "password"
    passwords = [random_password.redis.result]
  }
}

resource "aws_elasticache_user_group" "this" {
  user_group_id = var.name
  engine        = "valkey"
  user_ids      = [aws_elasticache_user.pretrade.user_id]
}

resource "random_password" "redis" {
  length  = 40
  special = false
}

resource "aws_secretsmanager_secret" "redis" {
  #checkov:skip=CKV2_AWS_57:Both ends are told by an application of this code, which a rotation on its own would contradict.
  name       = "${var.name}/redis"
  kms_key_id = aws_kms_key.this.arn
}

resource "aws_secretsmanager_secret_version" "redis" {
  secret_id     = aws_secretsmanager_secret.redis.id
  secret_string = random_password.redis.result
}

# --- PostgreSQL: the audit

resource "aws_db_subnet_group" "this" {
  name       = var.name
  subnet_ids = aws_subnet.private[*].id
}

resource "aws_db_parameter_group" "this" {
  name   = var.name
  family = "postgres${var.postgres.version}"
  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
  parameter {
    name  = "log_statement"
    value = "ddl"
  }
  parameter {
    name  = "log_min_duration_statement"
    value = "1000"
  }
}

resource "aws_db_instance" "this" {
  identifier                          = var.name
  engine                              = "postgres"
  engine_version                      = var.postgres.version
  instance_class                      = var.postgres.instance_class
  allocated_storage                   = var.postgres.gibibytes
  max_allocated_storage               = var.postgres.max_gibibytes
  storage_type                        = "gp3"
  storage_encrypted                   = true
  kms_key_id                          = aws_kms_key.this.arn
  db_name                             = "pretrade"
  username                            = "pretrade"
  manage_master_user_password         = true
  master_user_secret_kms_key_id       = aws_kms_key.this.arn
  iam_database_authentication_enabled = true
  multi_az                            = true
  db_subnet_group_name                = aws_db_subnet_group.this.name
  vpc_security_group_ids              = [aws_security_group.store["postgres"].id]
  parameter_group_name                = aws_db_parameter_group.this.name
  backup_retention_period             = var.postgres.retention_days
  copy_tags_to_snapshot               = true
  deletion_protection                 = true
  skip_final_snapshot                 = false
  final_snapshot_identifier           = "${var.name}-final"
  auto_minor_version_upgrade          = true
  performance_insights_enabled        = true
  performance_insights_kms_key_id     = aws_kms_key.this.arn
  enabled_cloudwatch_logs_exports     = ["postgresql", "upgrade"]
  monitoring_interval                 = 30
  monitoring_role_arn                 = aws_iam_role.rds_monitoring.arn
}
