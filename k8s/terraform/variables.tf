variable "name" {
  description = "Prefix of every name."
  type        = string
  default     = "pretrade"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "3 to 21 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "region" {
  description = "AWS region; the closest to the exchanges that the orders go to."
  type        = string
}

variable "peer_region" {
  description = "The other region of two, where exports and the topic of decisions are copied to; null for a region alone."
  type        = string
  default     = null
}

variable "cidr" {
  description = "Addresses of the network; those of two regions must not overlap."
  type        = string
  default     = "10.40.0.0/16"
}

variable "zones" {
  description = "Availability zones by name, three or more, one of which may be lost. Named, so that one that AWS adds changes nothing."
  type        = list(string)
  validation {
    condition     = length(var.zones) >= 3
    error_message = "A quorum outlives a zone only when there are three."
  }
}

variable "kubernetes_version" {
  description = "EKS version; native sidecars need 1.29 or later."
  type        = string
  default     = "1.33"
}

variable "operators" {
  description = "Addresses from which the Kubernetes API may be reached from outside; none for a private API only."
  type        = list(string)
  default     = []
}

variable "decision_nodes" {
  description = "Nodes of the decision servers: local NVMe for the journal's fsync, whole cores for guaranteed pods."
  type = object({
    instance_type = string
    min           = number
    max           = number
  })
  default = {
    instance_type = "c7gd.2xlarge"
    min           = 3
    max           = 12
  }
}

variable "general_nodes" {
  description = "Nodes of everything else."
  type = object({
    instance_type = string
    min           = number
    max           = number
  })
  default = {
    instance_type = "m7g.xlarge"
    min           = 3
    max           = 9
  }
}

variable "kafka" {
  description = "Brokers, one a zone or a multiple of it."
  type = object({
    version       = string
    instance_type = string
    brokers       = number
    gibibytes     = number
  })
  default = {
    version       = "3.8.x"
    instance_type = "kafka.m7g.large"
    brokers       = 3
    gibibytes     = 200
  }
}

variable "redis" {
  description = "Nodes of the feature cache: a primary and replicas in other zones."
  type = object({
    node_type = string
    nodes     = number
  })
  default = {
    node_type = "cache.r7g.large"
    nodes     = 3
  }
}

variable "postgres" {
  description = "The audit store; 1 KiB a decision."
  type = object({
    version        = string
    instance_class = string
    gibibytes      = number
    max_gibibytes  = number
    retention_days = number
  })
  default = {
    version        = "17"
    instance_class = "db.r7g.large"
    gibibytes      = 200
    max_gibibytes  = 2000
    retention_days = 35
  }
}

variable "export_retention_days" {
  description = "How long exports cannot be deleted or changed by anybody."
  type        = number
  default     = 2557
}
