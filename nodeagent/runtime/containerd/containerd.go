// Package containerd runs session containers through containerd's v2 client.
//
// One session has at most one container, whose id is the session id, so that
// containerd itself refuses a second one. What a container was made from is in
// <StateDir>/sessions/<session>/spec.json (mode 0600: it holds the environment
// and so secrets); containerd's labels carry only session and generation.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Defaults of Config.
const (
	DefaultNamespace   = "cloudcode"
	DefaultBridgeName  = "cloudcode0"
	DefaultSubnet      = "10.201.0.0/16"
	DefaultRuntimeName = "io.containerd.runc.v2"
)

// Labels on containers. Environment and mounts are not among them: labels are
// visible to everyone who may read the containerd socket, and are small.
const (
	labelSession    = "cloudcode.dev/session"
	labelGeneration = "cloudcode.dev/generation"
)

const (
	snapshotter = "overlayfs"
	// cleanupTimeout bounds what runs after a failure, when the caller's
	// context may have ended already.
	cleanupTimeout = 30 * time.Second
	// callTimeout bounds a single call that containerd should answer at once.
	callTimeout = 15 * time.Second
	// createTimeout bounds making a container from an image that is here. It
	// takes a quarter of a second on an idle machine.
	createTimeout = time.Minute
)

var bridgeName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,14}$`)

// Config of a Runtime. Only Address, StateDir, CNIBinDir and LogBinary are needed.
type Config struct {
	// Address is containerd's socket, an absolute path.
	Address string
	// Namespace of containerd that our containers and images are in.
	Namespace string
	// StateDir holds records, CNI state and pinned network namespaces. It
	// must survive a restart of the node daemon. It is made with mode 0700.
	StateDir string
	// CNIBinDir holds the plugins bridge (1.9 or newer) and host-local.
	CNIBinDir string
	// BridgeName is the bridge that containers hang on, at most 15 characters.
	BridgeName string
	// Subnet of the containers in CIDR form, IPv4. The bridge gets its first
	// address. New refuses it when it overlaps a route of this machine.
	Subnet string
	// LogBinary is the program that containerd starts for each container to
	// keep its output: an absolute path and at most one word (a subcommand).
	// The log folder is its last argument. It must call logger.Run.
	LogBinary []string
	// RuntimeName is the containerd runtime.
	RuntimeName string
	// Logger may be nil.
	Logger *slog.Logger
}

// Runtime implements runtime.Runtime.
type Runtime struct {
	version string
	cfg     Config
	subnet  netip.Prefix
	client  *ctd.Client
	net     *network
	log     *slog.Logger
	locks   keyedMutex
}

var _ runtime.Runtime = (*Runtime)(nil)

// New connects to containerd, makes the firewall table, and removes network
// state of containers that no longer exist. It waits at most as long as ctx
// for containerd to answer and returns runtime.ErrUnavailable when it does not.
func New(ctx context.Context, cfg Config) (*Runtime, error) {
	if cfg.Namespace == "" {
		cfg.Namespace = DefaultNamespace
	}
	if cfg.BridgeName == "" {
		cfg.BridgeName = DefaultBridgeName
	}
	if cfg.Subnet == "" {
		cfg.Subnet = DefaultSubnet
	}
	if cfg.RuntimeName == "" {
		cfg.RuntimeName = DefaultRuntimeName
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	subnet, err := netip.ParsePrefix(cfg.Subnet)
	if err != nil || !subnet.Addr().Is4() || subnet.Bits() > 29 {
		return nil, fmt.Errorf("subnet %q: want an IPv4 range such as %s, /29 or larger", cfg.Subnet, DefaultSubnet)
	}
	for _, d := range []string{cfg.StateDir, sessionsDir(cfg.StateDir), netnsDir(cfg.StateDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	// containerd's libraries print at level info by themselves.
	_ = log.SetLevel("error")
	r := &Runtime{cfg: cfg, subnet: subnet.Masked(), log: cfg.Logger}
	r.client, err = ctd.New(cfg.Address, ctd.WithDefaultNamespace(cfg.Namespace), ctd.WithTimeout(callTimeout))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", runtime.ErrUnavailable, cfg.Address, err)
	}
	if err := r.start(ctx); err != nil {
		_ = r.client.Close()
		return nil, err
	}
	return r, nil
}

func (r *Runtime) start(ctx context.Context) error {
	ctx = r.ns(ctx)
	vctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	v, err := r.client.Version(vctx)
	if err != nil {
		return fmt.Errorf("%w: containerd at %s does not answer: %w", runtime.ErrUnavailable, r.cfg.Address, err)
	}
	warnVersion(r.log, "containerd", v.Version)
	r.version = v.Version
	r.net, err = newNetwork(ctx, r.cfg, r.subnet)
	if err != nil {
		return err
	}
	return r.reconcile(ctx)
}

func (c Config) validate() error {
	if !filepath.IsAbs(c.StateDir) || !filepath.IsAbs(c.Address) || !filepath.IsAbs(c.CNIBinDir) {
		return errors.New("containerd runtime: Address, StateDir and CNIBinDir must be absolute paths")
	}
	if len(c.LogBinary) == 0 || len(c.LogBinary) > 2 || !filepath.IsAbs(c.LogBinary[0]) {
		return errors.New("containerd runtime: LogBinary must be an absolute path and at most one word")
	}
	if !bridgeName.MatchString(c.BridgeName) {
		return fmt.Errorf("bridge name %q: want a letter and at most 14 letters, digits or underscores", c.BridgeName)
	}
	for _, p := range []string{"bridge", "host-local"} {
		if _, err := os.Stat(filepath.Join(c.CNIBinDir, p)); err != nil {
			return fmt.Errorf("CNI plugin %s is not in %s (`make tools` builds it): %w", p, c.CNIBinDir, err)
		}
	}
	return nil
}

// Version is containerd's, as it was when New returned.
func (r *Runtime) Version() string { return r.version }

// Close lets go of containerd; containers go on running.
func (r *Runtime) Close() error { return r.client.Close() }

func (r *Runtime) ns(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.cfg.Namespace)
}

// afterwards returns a context for work that must happen although ctx may have ended.
func afterwards(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
}

// classify gives errors from containerd and the kernel one of runtime's classes.
func classify(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{
		runtime.ErrNotFound, runtime.ErrImageNotFound, runtime.ErrImagePull, runtime.ErrStaleGeneration,
		runtime.ErrInvalidSpec, runtime.ErrNoSpace, runtime.ErrUnavailable,
	} {
		if errors.Is(err, known) {
			return err
		}
	}
	switch {
	case isNoSpace(err):
		return fmt.Errorf("%w: %w", runtime.ErrNoSpace, err)
	case errdefs.IsUnavailable(err), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
	}
	return err
}

func isNoSpace(err error) bool {
	// Errors that crossed gRPC are text only.
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || containsAny(err.Error(), "no space left on device", "disk quota exceeded")
}
