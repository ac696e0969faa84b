package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloudcode-dev/cloudcode/cmd/cloudcode/internal/cli"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/nodeagent"
)

// stopTimeout bounds how long one of our processes takes to end.
const stopTimeout = 30 * time.Second

// processCmds returns the commands that run our processes.
func processCmds() []*cobra.Command {
	cmds := []*cobra.Command{newUpCmd(), newServerCmd(), newGatewayCmd(), newNodeAgentCmd()}
	for _, c := range cmds {
		c.GroupID = cli.GroupProcess
	}
	return cmds
}

// credentialsFromEnv reads what the original project reads.
func credentialsFromEnv() (username, password string) {
	return os.Getenv("SERVER_USERNAME"), os.Getenv("SERVER_PASSWORD")
}

// libexecDir returns the folder of the programs that the node daemon starts:
// libexec/cloudcode beside the folder of this program, unless the flag names one.
// Empty means PATH.
func libexecDir(flag string) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(filepath.Dir(exe), "..", "libexec", "cloudcode")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return filepath.Abs(dir)
}

func absDataDir(cmd *cobra.Command) (string, error) { return filepath.Abs(cli.DataDir(cmd)) }

// member is what every command that joins a fleet starts from.
type member struct {
	dataDir string
	server  string // host:port; of this machine unless --server names another
	token   func() (string, error)
	log     *slog.Logger
}

func newMember(cmd *cobra.Command) (member, error) {
	dataDir, err := absDataDir(cmd)
	if err != nil {
		return member{}, err
	}
	server, err := cmd.Flags().GetString("server")
	if err != nil {
		return member{}, err
	}
	if server == "" {
		server = defaultGRPCListen
	}
	return member{dataDir: dataDir, server: server, token: joinToken(cmd, dataDir), log: cli.Logger(cmd, slog.LevelInfo)}, nil
}

// joinToken returns how a member finds its join token: from the flag (or its
// environment variable), or from the data directory of a server on this machine.
func joinToken(cmd *cobra.Command, dataDir string) func() (string, error) {
	return func() (string, error) {
		if t, err := cmd.Flags().GetString("join-token"); err == nil && t != "" {
			return t, nil
		}
		path := filepath.Join(dataDir, "pki", "join-token")
		data, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("no join token: give it with --join-token (the server has it in pki/join-token below its data directory): %w", err)
		}
		return strings.TrimSpace(string(data)), nil
	}
}

func gatewayJoinOptions(server, id, dir string) pki.JoinOptions {
	return pki.JoinOptions{Server: server, Dir: dir, Identity: pki.Identity{Role: pki.RoleGateway, ID: id}}
}

// joinAsGateway becomes a member, however long the server is away.
func joinAsGateway(ctx context.Context, server, id, dir string, token func() (string, error), log *slog.Logger) (*pki.Member, error) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		t, tokenErr := token()
		jctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		o := gatewayJoinOptions(server, id, dir)
		o.Token = t
		member, err := pki.Join(jctx, o)
		cancel()
		if err == nil {
			return member, nil
		}
		log.Warn("cannot join the fleet yet", "server", server, "error", errors.Join(err, tokenErr), "retry_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// nodeFlags are the flags of every command that runs a node daemon.
type nodeFlags struct {
	id, containerd, libexec, bridge, subnet string
	labels                                  map[string]string
}

func (f *nodeFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.id, "node-id", "", "what the node is known by, a DNS label (default: from the host name)")
	fl.StringToStringVar(&f.labels, "node-label", nil, "label of the node, KEY=VALUE; can be repeated")
	fl.StringVar(&f.containerd, "containerd-address", "", "socket of a containerd to use (default: a private one below the data directory)")
	fl.StringVar(&f.libexec, "libexec-dir", "", "folder with containerd, its shim, runc, and cni/ (default: ../libexec/cloudcode beside this program, then PATH)")
	fl.StringVar(&f.bridge, "bridge", "", "name of the bridge that containers hang on (default: cloudcode0)")
	fl.StringVar(&f.subnet, "subnet", "", "IPv4 network of the containers (default: 10.201.0.0/16)")
}

func (f *nodeFlags) config(dataDir, server string, token func() (string, error), log *slog.Logger) (nodeagent.Config, error) {
	libexec, err := libexecDir(f.libexec)
	if err != nil {
		return nodeagent.Config{}, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nodeagent.Config{}, err
	}
	return nodeagent.Config{
		Dir: filepath.Join(dataDir, "node"), NodeID: f.id, Labels: f.labels, Server: server, JoinToken: token,
		ContainerdAddress: f.containerd, LibexecDir: libexec, BridgeName: f.bridge, Subnet: f.subnet,
		Executable: exe, Version: buildVersion(), Log: log,
	}, nil
}

// waitFor returns when the command's context ends, without an error, or when one
// of our processes has failed. wait must return after its process was stopped.
func waitFor(ctx context.Context, waits ...func() error) error {
	failed := make(chan error, len(waits))
	for _, wait := range waits {
		go func() {
			if err := wait(); err != nil {
				failed <- err
			}
		}()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// stopBounded runs a stop function after the command's own context has ended.
func stopBounded(ctx context.Context, stop func(context.Context) error) error {
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return stop(sctx)
}
