package routes

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// Bounds of one message; gRPC refuses more than 4 MiB.
const (
	chunkItems = 100
	chunkBytes = 256 << 10
)

// WatchRoutes implements gatewayv1.RouteService.
func (r *Routes) WatchRoutes(req *gatewayv1.WatchRoutesRequest, stream grpc.ServerStreamingServer[gatewayv1.WatchRoutesResponse]) error {
	id, err := r.config.Identify(stream.Context())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	g := &gateway{ID: id, Address: req.GetLinkAddress(), BaseURI: req.GetBaseUri(), end: cancel}
	if err := g.check(); err != nil {
		return err
	}
	r.connect(g)
	defer r.disconnect(g)
	r.log.InfoContext(ctx, "gateway connected", "gateway", id, "link", g.Address, "base_uri", g.BaseURI)
	r.save(ctx)

	err = r.send(ctx, g.BaseURI, stream)
	if stream.Context().Err() == nil && ctx.Err() != nil {
		return grpcerr.New(codes.Aborted, "REPLACED", "gateway %s has connected again", id)
	}
	return err
}

func (r *Routes) send(ctx context.Context, base string, stream grpc.ServerStreamingServer[gatewayv1.WatchRoutesResponse]) error {
	var revision store.Revision
	var all []*gatewayv1.Route
	// Collected first: a slow gateway must not hold a snapshot of the store open.
	if err := r.config.Store.View(ctx, func(tx store.ReadTx) error {
		revision, all = tx.Revision(), nil
		for s, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			all = append(all, route(s, base))
		}
		return nil
	}); err != nil {
		return err
	}
	for rest := all; ; {
		n, size := 0, 0
		for n < len(rest) && n < chunkItems && (n == 0 || size < chunkBytes) {
			size += proto.Size(rest[n])
			n++
		}
		chunk := &gatewayv1.RouteChunk{Routes: rest[:n], Last: n == len(rest)}
		if err := stream.Send(&gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Snapshot{Snapshot: chunk}}); err != nil {
			return err
		}
		if rest = rest[n:]; chunk.GetLast() {
			break
		}
	}
	// A gateway that falls too far behind gets fleet.ErrStale here: it opens the
	// stream again and reads everything.
	for change, err := range r.config.Store.Watch(ctx, revision) {
		if err != nil {
			return err
		}
		if change.Kind != store.KindSession {
			continue
		}
		changes := &gatewayv1.RouteChanges{}
		if change.Session != nil {
			changes.Upserts = []*gatewayv1.Route{route(change.Session, base)}
		} else {
			changes.Removes = []string{change.ID}
		}
		if err := stream.Send(&gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Changes{Changes: changes}}); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func route(s *fleet.Session, base string) *gatewayv1.Route {
	out := &gatewayv1.Route{Session: protoconv.Session(s, webURI(base, s.ID))}
	if s.Assignment != nil {
		out.NodeId, out.OpencodePassword = s.Assignment.Node, s.Assignment.Password
	}
	return out
}
