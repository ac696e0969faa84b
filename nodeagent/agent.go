// Package nodeagent is the node daemon: it joins a machine to the fleet, runs
// what the server assigns, reports, and links to the server and the gateways.
//
// It can be killed and started again under running sessions: containers are
// adopted by label, and what was assigned last is on disk, so that sessions are
// looked after while the server cannot be reached.
package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// Config of a node daemon.
type Config struct {
	// Dir keeps everything of the node, absolute; made with mode 0700.
	Dir string
	// NodeID is a DNS label; empty: from the machine's host name.
	NodeID string
	Labels map[string]string
	// Server is the host:port of the server's gRPC listener.
	Server string
	// JoinToken reads the join token when one is needed: at the first start, and
	// when the node's certificate nears its end.
	JoinToken func() (string, error)

	// ContainerdAddress names a containerd to use; empty: a private one below Dir.
	ContainerdAddress string
	// LibexecDir holds containerd, its shim, runc, and the CNI plugins below cni/.
	LibexecDir string
	// BridgeName and Subnet of the containers' network; empty: the defaults.
	BridgeName string
	Subnet     string
	// Executable is the cloudcode binary, which containerd starts to keep logs.
	Executable string

	// Ephemeral: a Start that fails leaves no containerd behind, as after Teardown.
	Ephemeral bool

	Version string
	Log     *slog.Logger

	// Prepare, if not nil, runs when the container runtime is ready and before any
	// session is looked after; an error ends the start. It may import images.
	Prepare func(ctx context.Context, r runtime.Runtime) error

	// Runtime, Volumes, OpenStore and Mounters replace the real ones in tests.
	Runtime   runtime.Runtime
	Volumes   worker.Volumes
	OpenStore func(storage.Config) (objstore.Store, error)
	Mounters  []mount.Mounter
}

// Agent is a node daemon.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	backend   *backend
	runtime   runtime.Runtime
	workerCfg worker.Config
	reports   *reporter
	local     *bufconn.Listener // reaches the agent's own gRPC server
	lock      *os.File
	instance  string // random, as old as Dir

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	workers  map[string]*worker.Worker
	adopted  map[string]runtime.Instance // found at start, not given to a worker yet
	assigned map[string]*nodev1.Assignment
	gateways map[string]*gatewayLink // by address

	saved      savedState
	dropMounts sync.Once
}

// gatewayLink is the link to one gateway.
type gatewayLink struct {
	cancel context.CancelFunc
	id     string
}

// failedStartTimeout bounds what follows a start that failed.
const failedStartTimeout = time.Minute

// lastSaveTimeout bounds the last checkpoints of sessions that end with the daemon.
const lastSaveTimeout = 20 * time.Second

// New checks the configuration.
func New(cfg Config) (*Agent, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("the node's directory must be absolute, not %q", cfg.Dir)
	}
	if cfg.OpenStore == nil {
		cfg.OpenStore = storage.Open
	}
	if cfg.NodeID == "" {
		id, err := HostID()
		if err != nil {
			return nil, err
		}
		cfg.NodeID = id
	}
	return &Agent{
		cfg: cfg, log: cfg.Log.With("node", cfg.NodeID), reports: newReporter(cfg.Log),
		local:   bufconn.Listen(256 << 10),
		workers: map[string]*worker.Worker{}, adopted: map[string]runtime.Instance{},
		assigned: map[string]*nodev1.Assignment{}, gateways: map[string]*gatewayLink{},
		saved: savedState{},
	}, nil
}

// NodeID is what the node is known by.
func (a *Agent) NodeID() string { return a.cfg.NodeID }

// Start makes the container runtime ready, adopts what runs, and goes on in the
// background with joining and serving. ctx bounds Start alone.
func (a *Agent) Start(ctx context.Context) (err error) {
	a.ctx, a.cancel = context.WithCancel(context.Background())
	defer func() {
		if err == nil {
			return
		}
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), failedStartTimeout)
		defer cancel()
		if a.cfg.Ephemeral {
			err = errors.Join(err, a.Teardown(sctx, func(string) {}))
		} else {
			err = errors.Join(err, a.Stop(sctx))
		}
	}()
	if err := os.MkdirAll(a.cfg.Dir, 0o700); err != nil {
		return err
	}
	if err := a.acquireLock(); err != nil {
		return err
	}
	if a.instance, err = instanceID(filepath.Join(a.cfg.Dir, "instance-id")); err != nil {
		return err
	}
	if a.backend, err = startBackend(ctx, a.cfg, a.log); err != nil {
		return err
	}
	a.runtime = a.backend.runtime
	a.workerCfg = worker.Config{
		Runtime: a.runtime, Volumes: a.backend.volumes,
		Storage: checkpoint.New(checkpoint.Config{
			Node: a.cfg.NodeID, Instance: a.instance, Mounters: a.backend.mounters, OpenStore: a.cfg.OpenStore, Log: a.log,
		}),
		LogDir:     a.logDir,
		RemoveLogs: func(session string) error { return os.RemoveAll(a.logDir(session)) },
		Report:     a.reports.put, Log: a.log,
	}
	if a.cfg.Prepare != nil {
		if err := a.cfg.Prepare(ctx, a.runtime); err != nil {
			return err
		}
	}
	if err := a.adopt(ctx); err != nil {
		return err
	}
	server := grpc.NewServer()
	nodev1.RegisterAgentServiceServer(server, &service{agent: a})
	a.wg.Go(func() {
		if err := server.Serve(a.local); err != nil {
			a.log.Debug("the agent's own listener ended", "error", err)
		}
	})
	a.wg.Go(func() {
		<-a.ctx.Done()
		server.Stop()
	})
	a.wg.Go(a.main)
	return nil
}

// acquireLock keeps a second node daemon away from the same folder.
func (a *Agent) acquireLock() error {
	f, err := os.OpenFile(filepath.Join(a.cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return fmt.Errorf("another node daemon uses %s: stop it, or name another --data-dir", a.cfg.Dir)
	}
	a.lock = f
	return nil
}

// Stop ends the daemon. Containers, their mounts and containerd go on, for the
// next daemon to adopt.
func (a *Agent) Stop(context.Context) error {
	a.cancel()
	a.wg.Wait()
	a.mu.Lock()
	workers := make([]*worker.Worker, 0, len(a.workers))
	for _, w := range a.workers {
		workers = append(workers, w)
	}
	a.mu.Unlock()
	var stopping sync.WaitGroup
	for _, w := range workers {
		stopping.Go(w.Stop)
	}
	stopping.Wait()
	var errs []error
	if a.backend != nil {
		errs = append(errs, a.backend.close())
		a.backend = nil
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
		a.lock = nil
	}
	return errors.Join(errs...)
}

// Teardown is Stop that also ends the sessions' containers and removes what the
// daemon made on this machine: network, mounts and the private containerd.
// Workspaces stay. progress is told of each container.
func (a *Agent) Teardown(ctx context.Context, progress func(string)) error {
	a.cancel()
	a.wg.Wait()
	a.mu.Lock()
	workers := a.workers
	a.workers = map[string]*worker.Worker{}
	a.mu.Unlock()
	a.saveAll(ctx, workers, progress)
	for _, w := range workers {
		w.Stop()
	}
	var errs []error
	if a.backend != nil {
		errs = append(errs, a.backend.teardown(ctx, progress))
	}
	return errors.Join(append(errs, a.Stop(ctx))...)
}

// saveAll makes a last checkpoint of every session that runs. One that cannot be
// saved now is saved at the next start: its files stay here.
func (a *Agent) saveAll(ctx context.Context, workers map[string]*worker.Worker, progress func(string)) {
	ctx, cancel := context.WithTimeout(ctx, lastSaveTimeout)
	defer cancel()
	var saving sync.WaitGroup
	for id, w := range workers {
		if !w.Stored() {
			continue
		}
		progress("saving session " + id)
		saving.Go(func() {
			if _, err := w.Checkpoint(ctx, checkpoint.TriggerStop); err != nil {
				a.log.Warn("a session could not be saved at the end; it is at the next start", "session", id, "error", err)
			}
		})
	}
	saving.Wait()
}

func (a *Agent) logDir(session string) string { return filepath.Join(a.cfg.Dir, "logs", session) }

// worker returns the worker of a session that is assigned to this node.
func (a *Agent) worker(session string) (*worker.Worker, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w, ok := a.workers[session]
	return w, ok && w.Assignment() != nil
}

// main joins, links, and registers again and again until the daemon stops.
func (a *Agent) main() {
	member, err := a.join()
	if err != nil {
		return // the daemon stops
	}
	conn, err := member.Dial(pki.RoleServer, a.cfg.Server)
	if err != nil {
		a.log.Error("cannot use the server's address", "server", a.cfg.Server, "error", err)
		return
	}
	defer conn.Close()
	a.restoreGateways(member)
	var links sync.WaitGroup
	defer links.Wait()
	links.Go(func() { member.KeepValid(a.ctx, a.joinOptions(), a.cfg.JoinToken, a.log) })
	// Only once the server has taken this machine for the node that it says it is:
	// a second one of the same id must not take its traffic.
	linkServer := sync.OnceFunc(func() {
		links.Go(func() { link.Keep(a.ctx, conn, a.dialTarget, a.log, nil) })
	})

	const first, longest = 200 * time.Millisecond, 5 * time.Second
	wait := first
	said := "" // of a server that cannot be reached: each cause once
	for a.ctx.Err() == nil {
		began := time.Now()
		err := a.registered(member, nodev1.NewDispatchServiceClient(conn), linkServer)
		if a.ctx.Err() != nil {
			return
		}
		if time.Since(began) > longest {
			wait, said = first, ""
		}
		level := slog.LevelInfo
		if status.Code(err) == codes.Unavailable {
			// Also a server with another authority: then only a person can help.
			level = slog.LevelWarn
			if text := err.Error(); text == said {
				level = slog.LevelDebug
			} else {
				said = text
			}
		}
		a.log.Log(a.ctx, level, "registration ended", "error", err, "retry_in", wait)
		if pause(a.ctx, jitter(wait)) != nil {
			return
		}
		wait = min(2*wait, longest)
	}
}

func (a *Agent) joinOptions() pki.JoinOptions {
	return pki.JoinOptions{Server: a.cfg.Server, Dir: a.cfg.Dir, Identity: pki.Identity{Role: pki.RoleNode, ID: a.cfg.NodeID}}
}

// join becomes a member, however long the server is away.
func (a *Agent) join() (*pki.Member, error) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		token, tokenErr := a.cfg.JoinToken()
		ctx, cancel := context.WithTimeout(a.ctx, 10*time.Second)
		o := a.joinOptions()
		o.Token = token
		member, err := pki.Join(ctx, o)
		cancel()
		if err == nil {
			return member, nil
		}
		if a.ctx.Err() != nil {
			return nil, a.ctx.Err()
		}
		a.log.Warn("cannot join the fleet yet", "server", a.cfg.Server, "error", errors.Join(err, tokenErr), "retry_in", wait)
		if err := pause(a.ctx, wait); err != nil {
			return nil, err
		}
	}
}

// registered runs one registration until it is over, and says why.
func (a *Agent) registered(member *pki.Member, client nodev1.DispatchServiceClient, accepted func()) error {
	ctx, cancel := context.WithCancelCause(a.ctx)
	defer cancel(nil)
	rctx, rcancel := context.WithTimeout(ctx, 15*time.Second)
	reg, err := client.Register(rctx, &nodev1.RegisterRequest{Info: a.info(), Labels: a.cfg.Labels, InstanceId: a.instance})
	rcancel()
	if err != nil {
		return err
	}
	accepted()
	id := reg.GetRegistrationId()
	a.log.Info("registered", "registration", id, "heartbeat_period", reg.GetHeartbeatPeriod().AsDuration())
	// The server may have missed what changed while we were not registered.
	a.mu.Lock()
	for _, w := range a.workers {
		w.Resend()
	}
	a.mu.Unlock()

	var wg sync.WaitGroup
	part := func(name string, run func() error) {
		wg.Go(func() { cancel(fmt.Errorf("%s: %w", name, run())) })
	}
	part("heartbeat", func() error { return heartbeat(ctx, client, id, reg.GetHeartbeatPeriod().AsDuration()) })
	part("assignments", func() error { return a.watchAssignments(ctx, member, client, id) })
	part("reports", func() error { return a.reports.run(ctx, client, id) })
	wg.Wait()
	return context.Cause(ctx)
}

// heartbeat renews the lease until the registration is over. A server that
// cannot be reached does not end the registration.
func heartbeat(ctx context.Context, client nodev1.DispatchServiceClient, id string, period time.Duration) error {
	if period <= 0 {
		period = time.Second // of a server that says nothing
	}
	for {
		if err := pause(ctx, period); err != nil {
			return err
		}
		hctx, cancel := context.WithTimeout(ctx, max(period, 5*time.Second))
		resp, err := client.Heartbeat(hctx, &nodev1.HeartbeatRequest{RegistrationId: id})
		cancel()
		switch {
		case err == nil && resp.GetHeartbeatPeriod().AsDuration() > 0:
			period = resp.GetHeartbeatPeriod().AsDuration()
		case status.Code(err) == codes.FailedPrecondition:
			return err
		}
	}
}

// watchAssignments applies what the server wants. A stream that breaks is opened
// again within the same registration.
func (a *Agent) watchAssignments(ctx context.Context, member *pki.Member, client nodev1.DispatchServiceClient, id string) error {
	const first, longest = 100 * time.Millisecond, 3 * time.Second
	wait := first
	for {
		err := a.followAssignments(ctx, member, client, id, func() { wait = first })
		if ctx.Err() != nil || status.Code(err) == codes.FailedPrecondition {
			return err
		}
		a.log.Debug("assignment stream ended", "error", err)
		if err := pause(ctx, jitter(wait)); err != nil {
			return err
		}
		wait = min(2*wait, longest)
	}
}

func (a *Agent) followAssignments(ctx context.Context, member *pki.Member, client nodev1.DispatchServiceClient, id string, healthy func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.WatchAssignments(ctx, &nodev1.WatchAssignmentsRequest{RegistrationId: id})
	if err != nil {
		return err
	}
	var full []*nodev1.Assignment
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		switch u := resp.GetUpdate().(type) {
		case *nodev1.WatchAssignmentsResponse_Snapshot:
			full = append(full, u.Snapshot.GetAssignments()...)
			if u.Snapshot.GetLast() {
				a.applyAll(full)
				full = nil
				healthy()
			}
		case *nodev1.WatchAssignmentsResponse_Changes:
			a.apply(u.Changes.GetUpserts(), u.Changes.GetRemoves())
		case *nodev1.WatchAssignmentsResponse_Gateways:
			a.setGateways(member, u.Gateways.GetGateways())
			a.saveState()
		}
	}
}

func (a *Agent) info() *cloudcodev1.NodeInfo {
	info := machineInfo(a.cfg.Dir)
	info.Version = a.cfg.Version
	if a.backend != nil {
		info.ContainerRuntimeVersion = a.backend.version
	}
	return info
}
