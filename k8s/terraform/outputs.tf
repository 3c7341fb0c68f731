output "cluster" {
  description = "For `aws eks update-kubeconfig --name`."
  value       = aws_eks_cluster.this.name
}

output "kafka_bootstrap_servers" {
  description = "PRETRADE_WORKER_KAFKA_BOOTSTRAP_SERVERS."
  value       = aws_msk_cluster.this.bootstrap_brokers_tls
}

output "redis_endpoint" {
  description = "Host of `redis-url`, a `rediss://` one."
  value       = aws_elasticache_replication_group.this.primary_endpoint_address
}

output "redis_secret" {
  description = "Where its password is."
  value       = aws_secretsmanager_secret.redis.arn
}

output "postgres_endpoint" {
  description = "Host and port of `database-url`."
  value       = aws_db_instance.this.endpoint
}

output "postgres_secret" {
  description = "Where its password is."
  value       = one(aws_db_instance.this.master_user_secret[*].secret_arn)
}

output "exports" {
  description = "For `pretrade audit export --to s3://…`."
  value       = aws_s3_bucket.this["exports"].bucket
}

output "registries" {
  description = "`newName` of the overlay's images."
  value       = { for name, repository in aws_ecr_repository.this : name => repository.repository_url }
}
