package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/cloudcode-dev/cloudcode/gateway"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/nodeagent"
)

// gatewayFlags are the flags of every command that runs a gateway.
type gatewayFlags struct {
	id, listen, linkListen, linkAdvertise, baseDomain, baseURI, rootSession string
	trustedOrigins                                                          []string
	allowAnonymous                                                          bool
}

func (f *gatewayFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.listen, "listen", "127.0.0.1:8080", "HTTP address of the gateway")
	fl.StringVar(&f.linkListen, "link-listen", "127.0.0.1:0", "address that nodes link to; nodes on other machines need a reachable one")
	fl.StringVar(&f.linkAdvertise, "link-advertise", "", "host:port that nodes are told to dial (default: the address of --link-listen)")
	fl.StringVar(&f.baseDomain, "base-domain", "localhost", "domain that sessions are below: {id}.DOMAIN")
	fl.StringVar(&f.baseURI, "base-uri", "", "where browsers reach the gateway (default: http://BASE-DOMAIN:PORT)")
	fl.StringVar(&f.rootSession, "root-session", "", "session that the bare host leads to, as in the original single-container project")
	fl.StringSliceVar(&f.trustedOrigins, "trusted-origin", nil, "origin of other web pages that may use the API from a browser; can be repeated")
	fl.BoolVar(&f.allowAnonymous, "allow-anonymous", false, "listen on addresses other than loopback although no SERVER_PASSWORD is set")
}

func (f *gatewayFlags) gatewayID() (string, error) {
	if f.id != "" {
		return f.id, nil
	}
	return nodeagent.HostID()
}

// start joins as a gateway and starts it. stop ends both it and its connection.
func (f *gatewayFlags) start(ctx context.Context, dataDir, server string, token func() (string, error), tokens []string, log *slog.Logger) (g *gateway.Gateway, stop func(context.Context) error, err error) {
	id, err := f.gatewayID()
	if err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(dataDir, "gateway")
	member, err := joinAsGateway(ctx, server, id, dir, token, log)
	if err != nil {
		return nil, nil, err
	}
	var conn *grpc.ClientConn
	if conn, err = member.Dial(pki.RoleServer, server); err != nil {
		return nil, nil, err
	}
	username, password := credentialsFromEnv()
	g, err = gateway.New(gateway.Config{
		Listen: f.listen, LinkListen: f.linkListen, LinkAdvertise: f.linkAdvertise,
		LinkTLS: member.ServerTLS(), ServerConn: conn,
		BaseDomain: f.baseDomain, BaseURI: f.baseURI, RootSession: f.rootSession,
		Username: username, Password: password, Tokens: tokens,
		AllowAnonymous: f.allowAnonymous, TrustedOrigins: f.trustedOrigins, Logger: log,
	})
	if err == nil {
		err = g.Start(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	vctx, endRenewing := context.WithCancel(context.WithoutCancel(ctx))
	renewing := make(chan struct{})
	go func() {
		defer close(renewing)
		member.KeepValid(vctx, gatewayJoinOptions(server, id, dir), token, log)
	}()
	return g, func(ctx context.Context) error {
		endRenewing()
		<-renewing
		defer conn.Close()
		return g.Stop(ctx)
	}, nil
}

func newGatewayCmd() *cobra.Command {
	var f gatewayFlags
	cmd := &cobra.Command{
		Use:   "gateway",
		Short: "Run a gateway: the front door for browsers and programs",
		Long: `Run a gateway. It joins the fleet of --server with a join token, serves the API
as JSON and server-sent events, the dashboard, and every session at
{id}.BASE-DOMAIN.

Basic credentials are taken from SERVER_USERNAME and SERVER_PASSWORD; the
password may be a bcrypt or argon2id hash (cloudcode auth hash-password).
Without a password nothing is asked for, and only loopback may be listened on.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := newMember(cmd)
			if err != nil {
				return err
			}
			g, stop, err := f.start(cmd.Context(), m.dataDir, m.server, m.token, localTokens(m.dataDir), m.log)
			if err != nil {
				return err
			}
			m.log.Info("gateway runs", "address", g.Addr(), "links", g.LinkAddr(), "server", m.server)
			failed := waitFor(cmd.Context(), g.Wait)
			return errors.Join(failed, stopBounded(cmd.Context(), stop))
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.id, "gateway-id", "", "what the gateway is known by, a DNS label (default: from the host name)")
	cmd.Flags().String("join-token", "", "join token of the fleet (default: pki/join-token below the data directory, for a server on this machine)")
	return cmd
}

// localTokens returns the admin token of a server on this machine, if it can be
// read: whoever can read it may use this gateway with it, too.
func localTokens(dataDir string) []string {
	data, err := os.ReadFile(filepath.Join(dataDir, "server", "token"))
	if err != nil {
		return nil
	}
	return []string{strings.TrimSpace(string(data))}
}
