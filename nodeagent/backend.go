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
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/rclone"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/tigrisfs"
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

// mounters that a node may have, the better one first.
var mounters = []struct {
	name string
	make func(process.Config) (*process.Mounter, error)
}{
	{"tigrisfs", tigrisfs.New},
	{"rclone", rclone.New},
}

// unmountTimeout bounds how long a bucket may take to be written to at the end.
const unmountTimeout = 30 * time.Second

// backend is what the daemon runs sessions with. This file is the only one that
// knows which.
type backend struct {
	runtime runtime.Runtime
	volumes worker.Volumes
	// mounters of buckets, in the order of preference.
	mounters []mount.Mounter
	version  string

	containerd *containerd.Runtime // nil when the runtime was given
	manager    *volume.Manager     // likewise
	daemon     *containerd.Daemon  // nil unless containerd is private
	dir        string
}

func startBackend(ctx context.Context, cfg Config, log *slog.Logger) (_ *backend, err error) {
	if cfg.Runtime != nil {
		return &backend{runtime: cfg.Runtime, volumes: cfg.Volumes, mounters: cfg.Mounters}, nil
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
	for _, kind := range mounters {
		m, err := kind.make(process.Config{Dir: filepath.Join(cfg.Dir, "mounters", kind.name), Log: log})
		if err != nil {
			return nil, fmt.Errorf("prepare %s: %w", kind.name, err)
		}
		b.mounters = append(b.mounters, m)
	}
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
	errs = append(errs, b.unmount(ctx, progress))
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

// unmount writes what is left to the buckets and ends their mounters. What cannot
// be written is said; it is lost.
func (b *backend) unmount(ctx context.Context, progress func(string)) error {
	var errs []error
	if b.manager != nil {
		volumes, err := b.manager.List(ctx)
		errs = append(errs, err)
		for _, v := range volumes {
			errs = append(errs, checkpoint.Detach(v))
		}
	}
	for _, m := range b.mounters {
		mounts, err := m.List(ctx)
		errs = append(errs, err)
		for _, i := range mounts {
			progress("unmounting the bucket of " + i.ID)
			uctx, cancel := context.WithTimeout(ctx, unmountTimeout)
			err := m.Unmount(uctx, i.ID)
			cancel()
			if removals, ok := errors.AsType[*mount.RemovalsLeftError](err); ok {
				progress(removals.Error())
				errs = append(errs, m.Abandon(ctx, i.ID))
				continue
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("bucket of %s: %w", i.ID, err), m.Abandon(ctx, i.ID))
			}
		}
	}
	return errors.Join(errs...)
}
