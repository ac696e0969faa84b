// Package container holds what node daemon, gateway and image agree on about
// the inside of a session's container.
package container

// How a session's OpenCode is reached: on loopback inside the container's own
// network namespace, with Basic Auth.
const (
	OpenCodePort = 2633
	OpenCodeUser = "opencode"
)

// Folders inside the container, as in the original project.
const (
	StorageDir   = "/root/s3" // everything that is kept
	WorkspaceDir = StorageDir + "/workspace"
	ProjectDir   = WorkspaceDir + "/project" // where OpenCode works
)

// Environment variables that Cloud Code sets.
const (
	EnvPassword = "OPENCODE_SERVER_PASSWORD" //nolint:gosec // the variable's name, not a secret
	EnvConfig   = "OPENCODE_CONFIG_CONTENT"
)
