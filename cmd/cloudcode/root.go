package main

import (
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/cloudcode-dev/cloudcode/cmd/cloudcode/internal/cli"
)

// version is set by the linker: -ldflags "-X main.version=v1.2.3".
var version string

// newRootCmd returns the whole command tree.
func newRootCmd() *cobra.Command {
	root := cli.NewRoot(buildVersion())
	// cli has the commands that talk to the processes, process.go those that run them.
	root.AddCommand(processCmds()...)
	cli.BindEnv(root)
	return root
}

// buildVersion returns the version set by the linker, or else the module's
// version as `go install` records it.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
