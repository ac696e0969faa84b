package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/containerd"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
)

// ContainerdAddressFile, in the node's directory, names the socket of the
// containerd that the node uses, for the CLI.
const ContainerdAddressFile = "containerd.address"

// stopsAtATime bounds how many containers are stopped together: their disks and
// network rules are taken apart then.
const stopsAtATime = 16

// backend is what the daemon runs sessions with. This file is the only one that
// knows which.
type backend struct {
	runtime runtime.Runtime
	volumes worker.Volumes
	version string

	containerd *containerd.Runtime // nil when the runtime was given
	manager    *volume.Manager     // likewise
	daemon     *containerd.Daemon  // nil unless containerd is private
	dir        string
}

func startBackend(ctx context.Context, cfg Config, log *slog.Logger) (_ *backend, err error) {
	if cfg.Runtime != nil {
		return &backend{runtime: cfg.Runtime, volumes: cfg.Volumes}, nil
	}
	b := &backend{dir: cfg.Dir}
	defer func() {
		if err == nil {
			return
		}
		if cfg.Ephemeral && b.daemon != nil {
			sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), failedStartTimeout)
			defer cancel()
			err = errors.Join(err, b.daemon.Stop(sctx))
		}
		err = errors.Join(err, b.close())
	}()
	address := cfg.ContainerdAddress
	if address == "" {
		b.daemon, err = containerd.StartDaemon(ctx, containerd.DaemonConfig{
			BinDir: cfg.LibexecDir, Dir: filepath.Join(cfg.Dir, "containerd"), Logger: log,
		})
		if err != nil {
			return nil, fmt.Errorf("start containerd: %w", err)
		}
		address = b.daemon.Address()
	}
	b.containerd, err = containerd.New(ctx, containerd.Config{
		Address: address, StateDir: filepath.Join(cfg.Dir, "runtime"),
		CNIBinDir:  filepath.Join(cfg.LibexecDir, "cni"),
		BridgeName: cfg.BridgeName, Subnet: cfg.Subnet,
		LogBinary: []string{cfg.Executable, "container-log"}, Logger: log,
	})
	if err != nil {
		return nil, fmt.Errorf("use containerd at %s: %w", address, err)
	}
	b.runtime, b.version = b.containerd, "containerd "+b.containerd.Version()
	b.manager = &volume.Manager{Dir: filepath.Join(cfg.Dir, "volumes")}
	b.volumes = b.manager
	if err := atomicfile.Write(filepath.Join(cfg.Dir, ContainerdAddressFile), []byte(address+"\n"), 0o644); err != nil {
		return nil, err
	}
	return b, nil
}

// close lets go of everything; it all goes on running.
func (b *backend) close() error {
	var errs []error
	if b.runtime != nil {
		errs = append(errs, b.runtime.Close())
	}
	if b.daemon != nil {
		errs = append(errs, b.daemon.Close())
	}
	return errors.Join(errs...)
}

// teardown ends containers and removes what was made on this machine, but no
// session's files.
func (b *backend) teardown(ctx context.Context, progress func(string)) error {
	instances, err := b.runtime.List(ctx)
	errs := []error{err}
	// At the same time: each may take all of its grace.
	stopped := make([]error, len(instances))
	var stopping errgroup.Group
	stopping.SetLimit(stopsAtATime)
	for n, i := range instances {
		progress("stopping session " + i.Session)
		stopping.Go(func() error {
			stopped[n] = b.runtime.Stop(ctx, i.Session, 10*time.Second)
			return nil
		})
	}
	_ = stopping.Wait() // the errors are in stopped
	errs = append(errs, stopped...)
	if b.containerd != nil {
		progress("removing the containers' network")
		errs = append(errs, b.containerd.Cleanup(ctx))
	}
	if b.manager != nil {
		errs = append(errs, b.manager.UnmountAll(ctx))
	}
	if b.daemon != nil {
		progress("stopping containerd")
		errs = append(errs, b.daemon.Stop(ctx), os.Remove(filepath.Join(b.dir, ContainerdAddressFile)))
	}
	return errors.Join(errs...)
}
