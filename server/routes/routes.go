// Package routes tells gateways where sessions are, and knows which gateways
// there are.
//
//	routes.New(routes.Config{Store: s, Identify: …, Log: log}) *routes.Service // gatewayv1.RouteServiceServer
package routes

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// chunkBytes bounds one message of the full set, far below gRPC's 4 MB.
const chunkBytes = 256 << 10

// Config of a Service.
type Config struct {
	Store store.Store
	// Identify returns the id of the gateway that calls.
	Identify func(ctx context.Context) (gatewayID string, err error)
	Log      *slog.Logger
}

// Service implements gatewayv1.RouteServiceServer.
type Service struct {
	gatewayv1.UnimplementedRouteServiceServer
	cfg Config

	mu       sync.Mutex
	gateways map[string]*member
	changed  chan struct{} // closed and replaced when gateways changes
}

// member is a gateway whose stream is open.
type member struct {
	linkAddress string
	baseURI     *url.URL // nil if it announced none
	replaced    chan struct{}
}

// New returns a service.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, gateways: map[string]*member{}, changed: make(chan struct{})}
}

// Gateways returns the gateways that nodes link to, by id, and a channel that is
// closed when they change.
func (s *Service) Gateways() ([]*nodev1.Gateway, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*nodev1.Gateway
	for id, m := range s.gateways {
		if m.linkAddress != "" {
			all = append(all, &nodev1.Gateway{Id: id, Address: m.linkAddress})
		}
	}
	slices.SortFunc(all, func(a, b *nodev1.Gateway) int { return strings.Compare(a.GetId(), b.GetId()) })
	return all, s.changed
}

// WebURI is where a browser finds a session's OpenCode, by the gateway with the
// first id; empty while there is none.
func (s *Service) WebURI(session string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := ""
	for id, m := range s.gateways {
		if m.baseURI != nil && (first == "" || id < first) {
			first = id
		}
	}
	if first == "" {
		return ""
	}
	u := *s.gateways[first].baseURI
	u.Host = session + "." + u.Host
	u.Path = "/"
	return u.String()
}

// add announces a gateway; an older stream of the same one ends.
func (s *Service) add(id string, m *member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.gateways[id]; old != nil {
		close(old.replaced)
	}
	s.gateways[id] = m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Service) remove(id string, m *member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gateways[id] != m {
		return
	}
	delete(s.gateways, id)
	close(s.changed)
	s.changed = make(chan struct{})
}

// WatchRoutes implements gatewayv1.RouteServiceServer.
func (s *Service) WatchRoutes(req *gatewayv1.WatchRoutesRequest, stream grpc.ServerStreamingServer[gatewayv1.WatchRoutesResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	id, err := s.cfg.Identify(ctx)
	if err != nil {
		return err
	}
	m := &member{linkAddress: req.GetLinkAddress(), replaced: make(chan struct{})}
	if req.GetBaseUri() != "" {
		if m.baseURI, err = url.Parse(req.GetBaseUri()); err != nil || m.baseURI.Host == "" {
			return grpcerr.New(codes.InvalidArgument, "INVALID_BASE_URI", "%q is not where a browser could reach a gateway: use something like http://localhost:8080", req.GetBaseUri())
		}
	}
	s.add(id, m)
	defer s.remove(id, m)
	s.cfg.Log.Info("gateway connected", "gateway", id, "links", m.linkAddress, "base_uri", req.GetBaseUri())
	go func() { // ends with ctx, which ends when we return
		select {
		case <-m.replaced:
			cancel()
		case <-ctx.Done():
		}
	}()

	revision, err := s.sendAll(ctx, stream)
	if err != nil {
		return err
	}
	for c, err := range s.cfg.Store.Watch(ctx, revision) {
		switch {
		case errors.Is(err, fleet.ErrStale):
			return grpcerr.New(codes.Aborted, "TOO_SLOW", "this gateway fell behind: watch again")
		case err != nil:
			return err
		case c.Kind != store.KindSession:
			continue
		}
		changes := &gatewayv1.RouteChanges{Removes: []string{c.ID}}
		if c.Session != nil {
			changes = &gatewayv1.RouteChanges{Upserts: []*gatewayv1.Route{s.route(c.Session)}}
		}
		if err := stream.Send(&gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Changes{Changes: changes}}); err != nil {
			return err
		}
	}
	if stream.Context().Err() == nil {
		return grpcerr.New(codes.Aborted, "REPLACED", "gateway %s has connected again", id)
	}
	return ctx.Err()
}

// sendAll sends the full set, and returns at which revision it was.
func (s *Service) sendAll(ctx context.Context, stream grpc.ServerStreamingServer[gatewayv1.WatchRoutesResponse]) (store.Revision, error) {
	var revision store.Revision
	chunk, size := &gatewayv1.RouteChunk{}, 0
	var all []*gatewayv1.RouteChunk // sent outside the transaction: a slow gateway must not hold it
	err := s.cfg.Store.View(ctx, func(tx store.ReadTx) error {
		revision = tx.Revision()
		for session, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			r := s.route(session)
			n := proto.Size(r)
			if size > 0 && size+n > chunkBytes {
				all = append(all, chunk)
				chunk, size = &gatewayv1.RouteChunk{}, 0
			}
			chunk.Routes = append(chunk.Routes, r)
			size += n
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	chunk.Last = true
	for _, c := range append(all, chunk) {
		if err := stream.Send(&gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Snapshot{Snapshot: c}}); err != nil {
			return 0, err
		}
	}
	return revision, nil
}

func (s *Service) route(session *fleet.Session) *gatewayv1.Route {
	r := &gatewayv1.Route{Session: protoconv.Session(session, s.WebURI(session.ID))}
	if a := session.Assignment; a != nil {
		r.NodeId, r.OpencodePassword = a.Node, a.Password
	}
	return r
}
