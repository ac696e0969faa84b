// Package routes tells gateways where sessions are, and the rest of the server
// which gateways there are.
//
//	r := routes.New(routes.Config{Store: db, Identify: gatewayID, Path: file, Logger: log})
//	gatewayv1.RegisterRouteServiceServer(grpcServer, r)
//	go r.Run(ctx)            // forgets gateways that do not come back
//	r.Gateways()             // for the dispatcher; with a channel that closes on change
//	r.WebURI(sessionID)      // for the API
//
// A gateway is known from when it opens its stream until Linger after the stream
// ended, and over a restart of the server (by the file at Path): a node drops its
// link to a gateway that is not listed, and traffic must go on while server and
// gateway have lost only one another.
package routes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// defaultLinger is longer than a gateway takes to restart or to notice that its
// connection is dead.
const defaultLinger = time.Minute

// Config of Routes. Store and Identify are needed.
type Config struct {
	Store store.Store
	// Identify returns the id of the gateway that calls, from its certificate.
	Identify func(ctx context.Context) (gatewayID string, err error)
	// Path of a file that keeps the known gateways over a restart; empty: none.
	Path string
	// Linger is how long a gateway is known after its stream ended; 0: a minute.
	Linger time.Duration
	Logger *slog.Logger
}

// Routes serves gatewayv1.RouteService and knows the gateways.
type Routes struct {
	gatewayv1.UnimplementedRouteServiceServer
	config Config
	log    *slog.Logger

	mu       sync.Mutex
	gateways map[string]*gateway
	changed  chan struct{} // closed and replaced when the list changes
	wake     chan struct{} // holds one: Run looks again

	saving sync.Mutex // held while the file is written
}

// gateway is one known gateway. Guarded by Routes.mu.
type gateway struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	BaseURI string `json:"base_uri"`

	end     context.CancelFunc // ends the open stream; nil if there is none
	expires time.Time          // without a stream: when it is forgotten
}

var _ gatewayv1.RouteServiceServer = (*Routes)(nil)

// New returns Routes that knows the gateways of the file. A file that cannot be
// read is no reason not to start: gateways come back by themselves.
func New(c Config) *Routes {
	if c.Linger <= 0 {
		c.Linger = defaultLinger
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Routes{
		config: c, log: c.Logger, gateways: map[string]*gateway{},
		changed: make(chan struct{}), wake: make(chan struct{}, 1),
	}
	known, err := load(c.Path)
	if err != nil {
		r.log.Warn("cannot read which gateways there were", "error", err)
	}
	for _, g := range known {
		g.expires = time.Now().Add(c.Linger)
		r.gateways[g.ID] = g
	}
	return r
}

// Gateways returns the known gateways by id, and a channel that closes when that
// has changed.
func (r *Routes) Gateways() ([]*nodev1.Gateway, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*nodev1.Gateway, 0, len(r.gateways))
	for _, g := range r.gateways {
		list = append(list, &nodev1.Gateway{Id: g.ID, Address: g.Address})
	}
	slices.SortFunc(list, func(a, b *nodev1.Gateway) int { return strings.Compare(a.GetId(), b.GetId()) })
	return list, r.changed
}

// BaseURI returns where browsers reach a gateway: of those with an open stream,
// else of those known, the one with the smallest id. Empty if there is none.
func (r *Routes) BaseURI() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var best *gateway
	for _, g := range r.gateways {
		if best == nil || (g.end != nil) != (best.end != nil) && g.end != nil ||
			(g.end != nil) == (best.end != nil) && g.ID < best.ID {
			best = g
		}
	}
	if best == nil {
		return ""
	}
	return best.BaseURI
}

// WebURI returns where a browser finds a session's OpenCode,
// "http://{id}.host:port/"; empty while no gateway is known.
func (r *Routes) WebURI(sessionID string) string { return webURI(r.BaseURI(), sessionID) }

func webURI(base, sessionID string) string {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" {
		return ""
	}
	return (&url.URL{Scheme: u.Scheme, Host: sessionID + "." + u.Host, Path: "/"}).String()
}

// Run forgets gateways that did not come back, until ctx ends.
func (r *Routes) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-timer.C:
		}
		next, gone := r.forget(time.Now())
		for _, id := range gone {
			r.log.WarnContext(ctx, "a gateway did not come back", "gateway", id, "waited", r.config.Linger)
		}
		if len(gone) > 0 {
			r.save(ctx)
		}
		timer.Reset(next)
	}
}

// forget removes who is due, and says how long nobody else will be.
func (r *Routes) forget(now time.Time) (next time.Duration, gone []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next = time.Hour
	for id, g := range r.gateways {
		switch {
		case g.end != nil:
		case !g.expires.After(now):
			delete(r.gateways, id)
			gone = append(gone, id)
		default:
			next = min(next, g.expires.Sub(now))
		}
	}
	if len(gone) > 0 {
		r.notify()
	}
	return next, gone
}

func (r *Routes) notify() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// connect makes a gateway known. Its older stream ends.
func (r *Routes) connect(g *gateway) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.gateways[g.ID]
	if old != nil && old.end != nil {
		old.end()
	}
	r.gateways[g.ID] = g
	if old == nil || old.Address != g.Address {
		r.notify()
	}
}

// disconnect says that the stream of g has ended; a newer one stays.
func (r *Routes) disconnect(g *gateway) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gateways[g.ID] != g {
		return
	}
	g.end, g.expires = nil, time.Now().Add(r.config.Linger)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func load(path string) ([]*gateway, error) {
	if path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var known []*gateway
	if err := json.Unmarshal(data, &known); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return slices.DeleteFunc(known, func(g *gateway) bool { return g == nil || g.ID == "" || g.check() != nil }), nil
}

// save writes the known gateways. The order of two saves does not matter: each
// writes what is known when it runs.
func (r *Routes) save(ctx context.Context) {
	if r.config.Path == "" {
		return
	}
	r.saving.Lock()
	defer r.saving.Unlock()
	r.mu.Lock()
	known := make([]gateway, 0, len(r.gateways))
	for _, g := range r.gateways {
		known = append(known, gateway{ID: g.ID, Address: g.Address, BaseURI: g.BaseURI})
	}
	r.mu.Unlock()
	slices.SortFunc(known, func(a, b gateway) int { return strings.Compare(a.ID, b.ID) })
	data, err := json.MarshalIndent(known, "", "  ")
	if err == nil {
		err = atomicfile.Write(r.config.Path, append(data, '\n'), 0o600)
	}
	if err != nil {
		r.log.WarnContext(ctx, "cannot keep which gateways there are; nodes drop their links to them if the server restarts now", "error", err)
	}
}

// check returns INVALID_ARGUMENT if an address is none.
func (g *gateway) check() error {
	if host, port, err := net.SplitHostPort(g.Address); err != nil || host == "" || port == "" || port == "0" {
		return grpcerr.New(codes.InvalidArgument, "INVALID_FIELDS", "link_address: %q is not the host:port of a gateway", g.Address)
	}
	if u, err := url.Parse(g.BaseURI); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return grpcerr.New(codes.InvalidArgument, "INVALID_FIELDS", "base_uri: %q is not like http://host:port", g.BaseURI)
	}
	return nil
}
