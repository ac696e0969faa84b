// Command cloudcode runs AI coding agents on people's own machines: the server,
// the gateway, the node daemon, and the command line that drives them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/cloudcode-dev/cloudcode/cmd/cloudcode/internal/cli"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd/logger"
)

// containerLog is the word that makes this program keep a container's output.
// containerd starts it so for each container.
const containerLog = "container-log"

func main() {
	// Before anything else: it is part of every session's start, and stays
	// beside the session in memory.
	if len(os.Args) == 3 && os.Args[1] == containerLog {
		if err := logger.Main(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends ctx; from then on a second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Execute(ctx, newRootCmd()))
}
