# Every image for every platform. Named, because bake would read compose.yaml too.
#   docker buildx bake -f docker-bake.hcl             server and CPU client for this machine's platform
#   docker buildx bake -f docker-bake.hcl all --push  everything, for a registry: REGISTRY=registry.example.org/ml/
#   docker buildx bake -f docker-bake.hcl client-jetson  needs arm64, or emulation

variable "REGISTRY" { default = "" }
variable "VERSION" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "PYTHON_IMAGE" { default = "python:3.11-slim-bookworm" }
variable "L4T_IMAGE" { default = "dustynv/pytorch:2.8-r36.4-cu128-24.04" }
# The index of torch's CPU builds; the package index holds the CUDA builds.
variable "TORCH_CPU_INDEX" { default = "" }

group "default" { targets = ["server", "client-cpu"] }
group "all" { targets = ["server-all", "client-cpu-all", "client-cuda", "client-jetson"] }

target "common" {
  context = "."
  args = {
    PYTHON_IMAGE = PYTHON_IMAGE
    VERSION      = VERSION
    REVISION     = REVISION
  }
}

target "server" {
  inherits   = ["common"]
  dockerfile = "services/Dockerfile"
  target     = "server"
  tags       = ["${REGISTRY}lorabbit-server:${VERSION}"]
}

target "client-cpu" {
  inherits   = ["common"]
  dockerfile = "services/Dockerfile"
  target     = "cpu"
  args       = { TORCH_INDEX = TORCH_CPU_INDEX }
  tags       = ["${REGISTRY}lorabbit-client:${VERSION}"]
}

target "server-all" {
  inherits  = ["server"]
  platforms = ["linux/amd64", "linux/arm64"]
}

target "client-cpu-all" {
  inherits  = ["client-cpu"]
  platforms = ["linux/amd64", "linux/arm64"]
}

target "client-cuda" {
  inherits   = ["common"]
  dockerfile = "services/Dockerfile"
  target     = "cuda"
  platforms  = ["linux/amd64", "linux/arm64"]
  tags       = ["${REGISTRY}lorabbit-client:${VERSION}-cuda"]
}

target "client-jetson" {
  context    = "."
  dockerfile = "services/client/Dockerfile.jetson"
  target     = "jetson"
  platforms  = ["linux/arm64"]
  args = {
    L4T_IMAGE = L4T_IMAGE
    VERSION   = VERSION
    REVISION  = REVISION
  }
  tags = ["${REGISTRY}lorabbit-client:${VERSION}-jetson"]
}
