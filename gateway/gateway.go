// Package gateway is the front door: it checks who calls, serves the API as
// JSON and Server-Sent Events, shows the dashboard, and passes traffic to
// sessions over the links that nodes keep open to it.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
)

// Config says how a gateway runs. ServerConn and LinkTLS are required; the zero
// value of everything else works.
type Config struct {
	// Listen is the HTTP address, host:port. Default 127.0.0.1:8080; port 0
	// picks one.
	Listen string
	// LinkListen is where nodes link to. Default 127.0.0.1:0.
	LinkListen string
	// LinkAdvertise is the host:port that nodes are told to dial. Default: the
	// address of the link listener.
	LinkAdvertise string
	// LinkTLS serves LinkListen; it must demand certificates of the fleet
	// (pki.Member.ServerTLS).
	LinkTLS *tls.Config
	// ServerConn is a connection to the server on which the gateway's own
	// certificate is shown. The gateway does not close it.
	ServerConn grpc.ClientConnInterface

	// BaseDomain is the domain that sessions are below. Default localhost,
	// which works in addition to any other.
	BaseDomain string
	// BaseURI is where browsers reach the gateway. Default
	// http://<base domain>:<port>.
	BaseURI string
	// RootSession is the id of a session that the bare host leads to. /v1/,
	// /cloudcode/, /healthz and /readyz stay the gateway's. Whatever that
	// session serves shares an origin with the API: set it only for a session
	// whose contents you trust as much as the API's users.
	RootSession string

	// Username and Password of Basic credentials, as auth.New takes them.
	// Without a password nothing is asked for, and Listen must be loopback.
	Username, Password string
	// Tokens are accepted as bearer tokens, when there is a password.
	Tokens []string
	// AllowAnonymous permits to listen on any address without a password.
	AllowAnonymous bool
	// TrustedOrigins, such as https://app.example.com, may use the API and
	// sessions from a browser, with the user's credentials.
	TrustedOrigins []string

	// StartWait is how long a program's request waits for a session that
	// starts. Default 12 s. Browsers wait for at most a second and are shown
	// how far the start has come.
	StartWait time.Duration
	// LinkWait is how long a request waits for a node that is not linked.
	// Default 8 s: nodes come back to a gateway that has restarted within 5.
	LinkWait time.Duration
	// Heartbeat is how long an event stream may be silent. Default 10 s.
	Heartbeat time.Duration
	// WriteTimeout is how long a reader of a stream of ours may not take
	// anything. Default 30 s.
	WriteTimeout time.Duration

	// Dialer replaces the link listener, in tests.
	Dialer Dialer
	Logger *slog.Logger
}

// Gateway is a running front door. Start it once and Stop it once.
type Gateway struct {
	cfg      Config
	log      *slog.Logger
	verify   *auth.Verifier
	bases    []string
	baseURI  *url.URL
	policy   *policy
	routes   *routes
	ups      *upstreams
	sessions cloudcodev1.SessionServiceClient
	handler  http.Handler

	hub      *link.Hub
	linkGRPC *grpc.Server
	listener net.Listener
	linkLis  net.Listener
	http     *http.Server

	ctx      context.Context // ends when every request must end
	cancel   context.CancelFunc
	draining context.Context // ends before that: streams have no end of their own
	drain    context.CancelFunc
	inFlight tracker
	wg       sync.WaitGroup
	failed   chan error // the first error of a listener
	done     chan struct{}
	stop     sync.Once
}

// New checks the configuration. Nothing runs before Start.
func New(cfg Config) (*Gateway, error) {
	setDefault(&cfg.Listen, "127.0.0.1:8080")
	setDefault(&cfg.LinkListen, "127.0.0.1:0")
	setDefault(&cfg.BaseDomain, "localhost")
	setDefault(&cfg.StartWait, 12*time.Second)
	setDefault(&cfg.LinkWait, 8*time.Second)
	setDefault(&cfg.Heartbeat, 10*time.Second)
	setDefault(&cfg.WriteTimeout, 30*time.Second)
	setDefault(&cfg.Logger, slog.New(slog.DiscardHandler))

	verify, err := auth.New(cfg.Username, cfg.Password)
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	for _, t := range cfg.Tokens {
		verify.AddToken(t)
	}
	if cfg.ServerConn == nil {
		return nil, errors.New("gateway: no connection to a server")
	}
	if cfg.LinkTLS == nil && cfg.Dialer == nil {
		return nil, errors.New("gateway: no certificate to serve nodes with")
	}
	if cfg.RootSession != "" && !validSessionID(cfg.RootSession) {
		return nil, fmt.Errorf("gateway: root session %q is no session id", cfg.RootSession)
	}
	cfg.BaseDomain = hostname(cfg.BaseDomain)
	if cfg.BaseDomain == "" {
		return nil, errors.New("gateway: the base domain must be a name, such as agents.example.com")
	}
	if _, err := netip.ParseAddr(cfg.BaseDomain); err == nil {
		return nil, fmt.Errorf("gateway: the base domain %s is an address: sessions need names below it", cfg.BaseDomain)
	}
	g := &Gateway{
		cfg: cfg, log: cfg.Logger, verify: verify,
		bases:    []string{cfg.BaseDomain},
		sessions: cloudcodev1.NewSessionServiceClient(cfg.ServerConn),
		failed:   make(chan error, 2),
		done:     make(chan struct{}),
	}
	if cfg.BaseDomain != "localhost" {
		g.bases = append(g.bases, "localhost")
	}
	if cfg.BaseURI != "" {
		u, err := url.Parse(cfg.BaseURI)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || strings.Trim(u.Path, "/") != "" {
			return nil, fmt.Errorf("gateway: base URI %q must look like https://agents.example.com, with no path", cfg.BaseURI)
		}
		g.baseURI = &url.URL{Scheme: u.Scheme, Host: u.Host}
	}
	if g.policy, err = newPolicy(cfg, g.bases, g.baseURI, verify.Enabled()); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	return g, nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Start listens and serves in the background. It returns an error when it
// cannot listen, or must not without a password.
func (g *Gateway) Start(ctx context.Context) error {
	if err := g.mayListen(ctx); err != nil {
		return err
	}
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", g.cfg.Listen)
	if err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	g.listener = lis
	if g.baseURI == nil {
		_, port, err := net.SplitHostPort(lis.Addr().String())
		if err != nil {
			return errors.Join(fmt.Errorf("gateway: %w", err), lis.Close())
		}
		host := net.JoinHostPort(g.cfg.BaseDomain, port)
		if port == "80" {
			host = g.cfg.BaseDomain
		}
		g.baseURI = &url.URL{Scheme: "http", Host: host}
	}

	g.ctx, g.cancel = context.WithCancel(context.WithoutCancel(ctx))
	g.draining, g.drain = context.WithCancel(g.ctx)
	dialer := g.cfg.Dialer
	if dialer == nil {
		if err := g.serveLinks(ctx); err != nil {
			g.cancel()
			return errors.Join(err, lis.Close())
		}
		dialer = g.hub
	}
	g.ups = newUpstreams(g.ctx, dialer, g.cfg.LinkWait)
	g.routes = newRoutes(g.ups.moved)
	g.handler = g.buildHandler()
	g.wg.Go(func() {
		g.routes.watch(g.ctx, g.cfg.ServerConn, &gatewayv1.WatchRoutesRequest{
			LinkAddress: g.LinkAddr(), BaseUri: g.baseURI.String(),
		}, g.log)
	})
	g.http = &http.Server{
		Handler: g.handler,
		// No read and write timeouts: prompts and streams take their time.
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return g.ctx },
		ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
	}
	g.wg.Go(func() {
		if err := g.http.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
			g.failed <- fmt.Errorf("gateway: serve %s: %w", lis.Addr(), err)
		}
	})
	g.log.Info("gateway listens", "address", lis.Addr().String(), "base_uri", g.baseURI.String(),
		"link", g.LinkAddr(), "auth", g.verify.Enabled())
	return nil
}

// mayListen refuses to open a door without a lock to others.
func (g *Gateway) mayListen(ctx context.Context) error {
	host, _, err := net.SplitHostPort(g.cfg.Listen)
	if err != nil {
		return fmt.Errorf("gateway: listen address %q: %w", g.cfg.Listen, err)
	}
	if g.verify.Enabled() || g.cfg.AllowAnonymous {
		return nil
	}
	var ips []net.IPAddr
	if host != "" {
		if ips, err = net.DefaultResolver.LookupIPAddr(ctx, host); err != nil {
			return fmt.Errorf("gateway: listen address %q: %w", g.cfg.Listen, err)
		}
	}
	for _, ip := range ips {
		if !ip.IP.IsLoopback() {
			ips = nil
			break
		}
	}
	if len(ips) == 0 {
		return fmt.Errorf("gateway: no password is set, so everybody who reaches %s could run code in every session; "+
			"set SERVER_PASSWORD, listen on 127.0.0.1, or allow it with --allow-anonymous", g.cfg.Listen)
	}
	return nil
}

func (g *Gateway) serveLinks(ctx context.Context) error {
	lis, err := new(net.ListenConfig).Listen(ctx, "tcp", g.cfg.LinkListen)
	if err != nil {
		return fmt.Errorf("gateway: link listener: %w", err)
	}
	if addr, ok := lis.Addr().(*net.TCPAddr); g.cfg.LinkAdvertise == "" && ok && addr.IP.IsUnspecified() {
		return errors.Join(fmt.Errorf("gateway: nodes cannot dial %s: say by which address they reach it (--link-advertise)", lis.Addr()), lis.Close())
	}
	g.linkLis = lis
	g.hub = link.NewHub(nodeOf, g.log)
	g.linkGRPC = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(g.cfg.LinkTLS)),
		// Nodes find out about a dead gateway by their pings, and we about them.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 3 * time.Second, PermitWithoutStream: true}),
	)
	linkv1.RegisterLinkServiceServer(g.linkGRPC, g.hub)
	g.wg.Go(func() {
		if err := g.linkGRPC.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			g.failed <- fmt.Errorf("gateway: serve links on %s: %w", lis.Addr(), err)
		}
	})
	return nil
}

// nodeOf takes a node's id from its certificate.
func nodeOf(ctx context.Context) (string, error) {
	id, ok := pki.FromContext(ctx)
	if !ok || id.Role != pki.RoleNode {
		return "", status.Error(codes.PermissionDenied, "only nodes link here")
	}
	return id.ID, nil
}

// Addr returns where HTTP is served, host:port. Valid after Start.
func (g *Gateway) Addr() string { return g.listener.Addr().String() }

// BaseURI returns where browsers reach the gateway. Valid after Start.
func (g *Gateway) BaseURI() string { return g.baseURI.String() }

// LinkAddr returns what nodes are told to dial, host:port. Valid after Start.
func (g *Gateway) LinkAddr() string {
	if g.cfg.LinkAdvertise != "" || g.linkLis == nil {
		return g.cfg.LinkAdvertise
	}
	return g.linkLis.Addr().String()
}

// Wait returns when the gateway has stopped, with the error that ended it if it
// was not Stop.
func (g *Gateway) Wait() error {
	select {
	case err := <-g.failed:
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return errors.Join(err, g.Stop(ctx))
	case <-g.done:
		return nil
	}
}

// Stop ends streams, lets other requests finish until ctx ends, and then cuts
// them. Everything has ended when it returns.
func (g *Gateway) Stop(ctx context.Context) error {
	var err error
	g.stop.Do(func() {
		defer close(g.done)
		if g.http == nil {
			return
		}
		g.drain()
		if err = g.http.Shutdown(ctx); err != nil {
			err = errors.Join(fmt.Errorf("gateway: requests were cut: %w", err), g.http.Close())
		}
		g.cancel()
		g.ups.closeAll()
		// WebSockets are no longer the HTTP server's: it does not wait for them.
		g.inFlight.wait(5 * time.Second)
		if g.hub != nil {
			g.hub.Close()
			g.linkGRPC.Stop()
		}
		g.wg.Wait()
	})
	<-g.done
	return err
}

// tracker counts requests. Unlike a WaitGroup it may be waited for while new
// ones come.
type tracker struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // closed when n falls to 0; nil unless somebody waits
}

func (t *tracker) add(d int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n += d; t.n == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

func (t *tracker) wait(most time.Duration) {
	t.mu.Lock()
	if t.n == 0 {
		t.mu.Unlock()
		return
	}
	if t.idle == nil {
		t.idle = make(chan struct{})
	}
	idle := t.idle
	t.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(most):
	}
}
