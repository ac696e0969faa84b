// Package server is the control plane: it keeps what sessions there are and
// should be, places them on nodes, and serves the public API, the node protocol
// and the gateways. This file only wires its parts.
package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/api"
	"github.com/cloudcode-dev/cloudcode/server/dispatch"
	"github.com/cloudcode-dev/cloudcode/server/eventlog"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/join"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/reconcile"
	"github.com/cloudcode-dev/cloudcode/server/routes"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

// Server is one control plane. It can be started once.
type Server struct {
	config   Config
	log      *slog.Logger
	verifier *auth.Verifier

	listener net.Listener
	grpc     *grpc.Server

	streams    context.Context // ends when streams must
	endStreams context.CancelFunc

	cleanup []func() error // run last to first

	failed   chan error // holds the first failure of a part
	stopOnce sync.Once
	stopped  chan struct{}
	stopErr  error
}

// New checks the configuration; it touches neither disk nor network.
func New(c Config) (*Server, error) {
	c.setDefaults()
	verifier, err := c.verifier()
	if err != nil {
		return nil, err
	}
	s := &Server{config: c, log: c.Logger, verifier: verifier, failed: make(chan error, 1), stopped: make(chan struct{})}
	s.streams, s.endStreams = context.WithCancel(context.Background())
	return s, nil
}

// Addr is where the server listens; nil before Start.
func (s *Server) Addr() net.Addr {
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Start returns when the server listens, or why it cannot; then everything is
// undone. ctx bounds the start only.
func (s *Server) Start(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo())
		}
	}()
	s.onStop(func() error { s.endStreams(); return nil })
	// Others may look for the address and the authority's certificate here; what is
	// secret is so by its own mode.
	if err := os.MkdirAll(serverDir(s.config.DataDir), 0o755); err != nil {
		return fmt.Errorf("create the server's directory: %w", err)
	}
	// The store first: its lock says whether another server is here.
	db, err := boltstore.Open(storePath(s.config.DataDir))
	if err != nil {
		return err
	}
	s.onStop(db.Close)
	ca, err := pki.LoadOrCreateCA(pkiDir(s.config.DataDir))
	if err != nil {
		return err
	}
	tlsConfig, err := ca.ServerTLS(s.config.certificateHosts())
	if err != nil {
		return fmt.Errorf("make the server's certificate: %w", err)
	}
	token, err := loadOrCreateToken(TokenPath(s.config.DataDir))
	if err != nil {
		return err
	}
	s.verifier.AddToken(token)

	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(tlsConfig)),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		// gRPC's default of 5 min would cut off everybody who looks more often
		// whether the connection is alive.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.ConnectionTimeout(20*time.Second),
		grpc.WaitForHandlers(true),
	)
	joinToken, err := pki.LoadOrCreateToken(pkiDir(s.config.DataDir), ca)
	if err != nil {
		return fmt.Errorf("the join token: %w", err)
	}
	nodev1.RegisterJoinServiceServer(s.grpc, join.New(join.Config{CA: ca, Secret: joinToken.Secret, Logger: s.log}))
	gateways := routes.New(routes.Config{
		Store: db, Identify: identify(pki.RoleGateway), Path: gatewaysPath(s.config.DataDir), Logger: s.log,
	})
	gatewayv1.RegisterRouteServiceServer(s.grpc, gateways)
	objects := storage.New(storage.Config{Store: db, Profiles: s.config.StorageProfiles, Own: s.config.OwnStorage, Logger: s.log})
	s.onStop(objects.Close)
	dispatcher := dispatch.New(dispatch.Config{
		Store: db, Gateways: gateways, Storage: objects, Identify: identify(pki.RoleNode), Logger: s.log,
	})
	nodev1.RegisterDispatchServiceServer(s.grpc, dispatcher)
	hub := link.NewHub(identify(pki.RoleNode), s.log)
	linkv1.RegisterLinkServiceServer(s.grpc, hub)
	agents := newAgents(hub)
	s.onStop(agents.close)

	events := eventlog.New(eventlog.Config{
		Store: db, Agents: agents, Logger: s.log,
		Session: func(sess *fleet.Session) *cloudcodev1.Session {
			return protoconv.Session(sess, gateways.WebURI(sess.ID))
		},
	})
	s.onStop(events.Close)

	sessions, nodes, storages := api.New(api.Config{
		Store: db, Events: events, Agents: agents, Storage: objects, DefaultImage: s.config.DefaultImage, Log: s.log,
		WebURI: gateways.WebURI, Heartbeat: dispatcher.HeartbeatTime,
	})
	cloudcodev1.RegisterSessionServiceServer(s.grpc, sessions)
	cloudcodev1.RegisterNodeServiceServer(s.grpc, nodes)
	cloudcodev1.RegisterStorageServiceServer(s.grpc, storages)
	healthServer := health.NewServer()
	healthv1.RegisterHealthServer(s.grpc, healthServer)
	reflection.Register(s.grpc)

	s.background("routes", gateways.Run)
	s.background("dispatcher", dispatcher.Run)
	s.background("storage", objects.Run)
	s.background("reconciler", reconcile.New(db, s.log).Run)

	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.config.GRPCListen)
	if err != nil {
		return fmt.Errorf("listen for gRPC: %w: is another server running, or does --grpc-listen name an address that this machine does not have?", err)
	}
	s.listener = listener
	s.serve(healthServer, hub)
	if err := atomicfile.Write(AddressPath(s.config.DataDir), []byte(localAddress(listener.Addr())+"\n"), 0o644); err != nil {
		return err
	}
	s.onStop(func() error { return os.Remove(AddressPath(s.config.DataDir)) })
	s.log.InfoContext(ctx, "server is ready", "grpc", listener.Addr().String(), "data_dir", s.config.DataDir, "password", s.verifier.Enabled())
	return nil
}

// serve serves until it is stopped.
func (s *Server) serve(healthServer *health.Server, hub *link.Hub) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.grpc.Serve(s.listener); err != nil {
			s.fail(fmt.Errorf("gRPC: %w", err))
		}
	}()
	s.onStop(func() error {
		healthServer.Shutdown() // watchers of the health service are told first
		s.endStreams()
		hub.Close() // links wait for bytes, not for a context
		graceful := make(chan struct{})
		go func() {
			defer close(graceful)
			s.grpc.GracefulStop()
		}()
		select {
		case <-graceful:
		case <-time.After(s.config.StopTimeout):
			s.log.Warn("calls still ran when the server stopped", "waited", s.config.StopTimeout)
			s.grpc.Stop()
			<-graceful
		}
		<-done
		return nil
	})
}

// background runs a part until the server stops, and waits for it then.
func (s *Server) background(name string, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := run(ctx); err != nil && ctx.Err() == nil {
			s.fail(fmt.Errorf("%s: %w", name, err))
		}
	}()
	s.onStop(func() error {
		cancel()
		<-done
		return nil
	})
}

func (s *Server) onStop(fn func() error) { s.cleanup = append(s.cleanup, fn) }

func (s *Server) undo() error {
	var errs []error
	for len(s.cleanup) > 0 {
		last := len(s.cleanup) - 1
		fn := s.cleanup[last]
		s.cleanup = s.cleanup[:last]
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

func (s *Server) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// Stop ends streams, waits for calls that run (at most Config.StopTimeout, or
// until ctx ends) and releases everything. It can be called more than once.
func (s *Server) Stop(ctx context.Context) error {
	s.stopOnce.Do(func() {
		defer close(s.stopped)
		if s.grpc != nil {
			defer context.AfterFunc(ctx, s.grpc.Stop)()
		}
		s.stopErr = s.undo()
		s.log.Info("server has stopped")
	})
	<-s.stopped
	return s.stopErr
}

// Wait returns the first failure of a part, or nil once the server was stopped.
func (s *Server) Wait() error {
	select {
	case err := <-s.failed:
		return err
	case <-s.stopped:
		return nil
	}
}

// Run starts the server, waits until ctx ends or a part fails, and stops it.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Start(ctx); err != nil {
		return err
	}
	var err error
	select {
	case err = <-s.failed:
	case <-ctx.Done():
	}
	return errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
}

// identify returns the id of a caller who has proved to have a role.
func identify(role pki.Role) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		if err := authorizeMember(ctx, role); err != nil {
			return "", err
		}
		id, _ := pki.FromContext(ctx)
		return id.ID, nil
	}
}

// localAddress is how this machine reaches a listener.
func localAddress(a net.Addr) string {
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

func loadOrCreateToken(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err == nil {
		if token := strings.TrimSpace(string(data)); token != "" {
			return token, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the admin token: %w", err)
	}
	token := rand.Text()
	if err := atomicfile.Write(path, []byte(token+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("write the admin token: %w", err)
	}
	return token, nil
}
